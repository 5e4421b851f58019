"""Latent steps inside an unmodified vLLM.

    VLLMEngine (../vllm_engine.py) ── requests ──► vLLM: scheduler, paged KV cache, prefix cache, CUDA graphs
        ▲                                             │ inputs_embeds: mixtures where a step was latent
        └── records of finished samples ── Decoder ┴ logits: the next step of every sample

`../decoding.py` is the method on a device: settings, history and draws, by slot. `v1_runner.py` and `v2_state.py`
connect it to vLLM's two model runners, `workers.py` to its worker processes. `weights.py` loads published weights and
reads back what the model then holds, `prefix_cache.py` keeps latent histories apart, `serving.py` and `admission.py`
answer vLLM's own server, and `support.py` lists the supported versions of vLLM and models (and imports no vLLM).
"""
