"""Run Mixture-of-Experts language models on devices they do not fit on."""
