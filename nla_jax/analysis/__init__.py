"""What is done with a trained NLA beyond its own methods: texts from files, a page to read, plots."""
