"""The autoencoder itself: prompts, activation verbalizer (AV), activation reconstructor (AR), metrics."""
