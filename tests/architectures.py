"""Which architectures the tests run, by model type, and why the others are not among them."""

import re
from pathlib import Path

import transformers

NAMED = (  # the full grid of dtypes, batches, masks and cache sizes
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "qwen2_moe",
    "jamba",
    "switch_transformers",
    "nllb-moe",
)
OTHERS = (
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling_text",
    "inkling2_text",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp_text",
    "solar_open",
    "zaya",
)
ALL = NAMED + OTHERS
MULTIMODAL = (  # given text only: the text part where transformers loads that alone, else the whole model
    "aria",
    "gemma4",
    "glm4v_moe",
    "glm5_next",
    "inkling2",
    "inkling_mm_model",
    "minimax_m3_vl",
    "mistral_large4",
    "muse_spark",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "qwen4_exp",
)
REFUSED = {  # with a clear error
    "diffusion_gemma": "fills blocks of text by diffusion",
    "ernie4_5_vl_moe": "stores experts for text and for images mixed",
    "openai_privacy_filter": "labels tokens",
    "qwen3_omni_moe": "several models in one, one of which speaks",
}
NOT_TRIED = {
    "deepseek_ocr2": "reads scanned pages, no text without one",
    "unlimited_ocr": "reads scanned pages, no text without one",
}


def decorated() -> set[str]:
    """The folders of transformers' models whose experts are marked with `use_experts_implementation`."""
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return {file.parent.name for file in files if re.search(r"^@use_experts_implementation", file.read_text(), re.M)}
