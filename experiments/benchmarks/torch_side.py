"""The same NLA in torch and transformers, as one would write it there: every row runs its whole prompt.

Masters are float32; bfloat16 means autocast for training and weights in bfloat16 for inference. Attention is sdpa,
AdamW is fused, logits exist for answer tokens alone. Right padding needs no mask under causal attention.
Shape letters: B rows, T answer tokens, P prompt tokens, D model, V vocabulary.
"""

import contextlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.setting import OPTIMIZER, Setting

MAX_LOG_RATIO = 12.0


def set_up(gpu: bool) -> torch.device:
    """Set torch to use all cores and exact float32 products, and return its device.

    Raises:
      RuntimeError: `gpu` is true, but torch sees no GPU.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    if gpu and not torch.cuda.is_available():
        raise RuntimeError(
            f"JAX runs on a GPU, but torch {torch.__version__} sees none; install a CUDA build of torch"
        )
    return torch.device("cuda" if gpu else "cpu")


def finished(run: Callable[[], object]) -> Callable[[], object]:
    """A function that does the work and waits until the device has finished it."""

    def waiting() -> object:
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return waiting


def numpy(x: Tensor) -> np.ndarray:
    """A tensor as float32 on the host."""
    return x.detach().float().cpu().numpy()


class TorchSide:
    """Models of one setting on torch's device, loaded from the exported weights."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        self.half = setting.dtype == "bfloat16"
        prompt = setting.prompts[0]
        self.slot = len(prompt.prefix)
        self.prompt_P = self.tensor([*prompt.prefix, prompt.marker, *prompt.tail])

    def tensor(self, array: object) -> Tensor:
        """A host array or list on the device, ids as int64."""
        tensor = torch.tensor(np.asarray(array), device=self.device)
        return tensor if tensor.is_floating_point() else tensor.long()

    def load(self, *, master: bool) -> transformers.PreTrainedModel:
        """The causal LM: in float32 if it is to be trained, else in the setting's dtype."""
        dtype = torch.bfloat16 if self.half and not master else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.setting.exported, dtype=dtype, attn_implementation="sdpa"
        )
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        return model.to(self.device).train(master)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 products from float32 masters, if the setting is bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def backbone(self, *, master: bool) -> nn.Module:
        """Blocks 0..K without final norm and head."""
        model = self.load(master=master).model
        model.layers = model.layers[: self.setting.layer + 1]
        model.config.num_hidden_layers = self.setting.layer + 1
        model.norm = nn.Identity()
        return model

    def embed(
        self, model: transformers.PreTrainedModel, activations_BD: Tensor, answers_BT: Tensor | None = None
    ) -> Tensor:
        """Embeddings of prompt and answer, the activation in its slot."""
        tokens_BT = self.prompt_P.expand(len(activations_BD), -1)
        if answers_BT is not None:
            tokens_BT = torch.cat([tokens_BT, answers_BT], dim=1)
        embedded = model.get_input_embeddings()(tokens_BT)
        vectors_BD = F.normalize(activations_BD, dim=-1) * self.setting.verbalizer.scale
        embedded[:, self.slot] = vectors_BD.to(embedded.dtype)
        return embedded

    def log_probs(
        self, model: transformers.PreTrainedModel, activations_BD: Tensor, answers_BT: Tensor
    ) -> Tensor:
        """Log-probability of each answer token; the last one predicts nothing and is not run."""
        T = answers_BT.shape[1]
        embedded = self.embed(model, activations_BD, answers_BT[:, :-1])
        logits_BTV = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=T).logits.float()
        return -F.cross_entropy(logits_BTV.flatten(0, 1), answers_BT.flatten(), reduction="none").view(-1, T)

    @torch.inference_mode()
    def generate(
        self,
        model: transformers.PreTrainedModel,
        activations_BD: Tensor,
        new_tokens: int,
        cache: str | None,
    ) -> Tensor:
        """Sample answers of full length at temperature 1; (B, T)."""
        embedded = self.embed(model, activations_BD)
        return model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long, device=self.device),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            cache_implementation=cache,
        )


class TorchReconstructor(nn.Module):
    """The AR: the backbone, read at the last token by a linear head in float32."""

    def __init__(self, side: TorchSide):
        super().__init__()
        self.side, self.backbone = side, side.backbone(master=True)
        d_model = side.setting.config.d_model
        self.head = nn.Linear(d_model, d_model, bias=False, device=side.device)
        nn.init.eye_(self.head.weight)
        self.prefix = side.setting.prompts[1].prefix

    def direction_mse(self, prompts_BT: Tensor, lengths_B: Tensor, activations_BD: Tensor) -> Tensor:
        """Direction MSE of each row, 2(1 - cos)."""
        prefix_BT = self.side.tensor(self.prefix).expand(len(prompts_BT), -1)
        tokens_BT = torch.cat([prefix_BT, prompts_BT], dim=1)
        with self.side.autocast():
            hidden_BTD = self.backbone(tokens_BT, use_cache=False).last_hidden_state
        rows, last_B = torch.arange(len(tokens_BT), device=self.side.device), lengths_B - 1 + len(self.prefix)
        predicted_BD = self.head(hidden_BTD[rows, last_B].float())
        return 2 - 2 * F.cosine_similarity(predicted_BD, activations_BD, dim=-1)


class Trainer:
    """AdamW with clipped gradients, set as ours is."""

    def __init__(self, model: nn.Module):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.b1, OPTIMIZER.b2),
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )

    def step(self, loss_of: Callable[..., Tensor], pieces: Sequence[tuple]) -> tuple[float, float]:
        """Sum the gradients of `loss_of` over micro-batches and update; loss and gradient norm."""
        total = torch.zeros(())
        for piece in pieces:
            loss = loss_of(*piece)
            loss.backward()
            total = total + loss.detach().cpu()
        norm = nn.utils.clip_grad_norm_(self.parameters, OPTIMIZER.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total), float(norm)


class TorchRound:
    """A GRPO round: sample groups, score and train the AR, train the AV with k3 KL to its frozen start.

    As in ours, the AR's errors before its update are the rewards; the policy's own log-probs, detached, are the old
    ones, which spares a pass.
    """

    def __init__(self, side: TorchSide, encode: Callable, decode: Callable, kl_coefficient: float):
        self.side, self.encode, self.decode = side, encode, decode
        self.kl_coefficient, sizes = kl_coefficient, side.setting.sizes
        self.group, self.new_tokens, self.micro_batches = sizes.group, sizes.new_tokens, sizes.micro_batches
        # On a GPU a static cache has its decoding step compiled.
        self.cache = "static" if side.device.type == "cuda" else None
        self.policy, self.reference = side.load(master=True), side.load(master=False)
        # A copy in half precision samples faster than autocast, which would cast the weights at every token.
        self.sampler = side.load(master=False) if side.half else self.policy
        self.reconstructor = TorchReconstructor(side)
        self.av, self.ar = Trainer(self.policy), Trainer(self.reconstructor)

    def __call__(self, activations_ND: np.ndarray) -> dict[str, float]:
        """Sample and update."""
        repeated_BD = np.repeat(activations_ND, self.group, axis=0)
        if self.sampler is not self.policy:
            with torch.no_grad():
                torch._foreach_copy_(list(self.sampler.parameters()), list(self.policy.parameters()))
        self.policy.eval()
        tokens_BT = self.side.generate(
            self.sampler, self.side.tensor(repeated_BD), self.new_tokens, self.cache
        )
        self.policy.train()
        return self.update(repeated_BD, tokens_BT.clone())

    def update(self, activations: np.ndarray, tokens_BT: Tensor) -> dict[str, float]:
        """Both updates from given answers; the metrics have the names of ours."""
        texts = self.decode(tokens_BT.cpu().numpy())
        prompts_BT, lengths_B = (self.side.tensor(column) for column in self.encode(texts))
        activations_BD = self.side.tensor(activations)
        mse = []

        def ar_loss(prompts_BT, lengths_B, activations_BD):
            mse_B = self.reconstructor.direction_mse(prompts_BT, lengths_B, activations_BD)
            mse.append(mse_B.detach())
            return mse_B.sum() / len(tokens_BT)

        loss, norm = self.ar.step(ar_loss, self._pieces(prompts_BT, lengths_B, activations_BD))
        metrics = {"ar_loss": loss, "ar_grad_norm": norm}
        rewards_NG = -torch.cat(mse).view(-1, self.group)
        centered_NG = rewards_NG - rewards_NG.mean(dim=1, keepdim=True)
        advantages_B = (centered_NG / (rewards_NG.std(dim=1, keepdim=True, correction=0) + 1e-4)).flatten()
        kl = []

        def av_loss(activations_BD, answers_BT, advantages_B):
            with torch.no_grad():
                reference_BT = self.side.log_probs(self.reference, activations_BD, answers_BT)
            with self.side.autocast():
                log_probs_BT = self.side.log_probs(self.policy, activations_BD, answers_BT)
            ratio_BT = torch.exp(log_probs_BT - log_probs_BT.detach())
            gain_BT = torch.minimum(
                ratio_BT * advantages_B[:, None], ratio_BT.clamp(0.8, 1.2) * advantages_B[:, None]
            )
            delta_BT = (reference_BT - log_probs_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            kl_BT = torch.exp(delta_BT) - delta_BT - 1
            kl.append(float(kl_BT.detach().sum()))
            return (kl_BT * self.kl_coefficient - gain_BT).sum() / tokens_BT.numel()

        _, norm = self.av.step(av_loss, self._pieces(activations_BD, tokens_BT, advantages_B))
        return metrics | {"av_grad_norm": norm, "kl": sum(kl) / tokens_BT.numel()}

    def _pieces(self, *arrays: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(array.chunk(self.micro_batches) for array in arrays), strict=True))
