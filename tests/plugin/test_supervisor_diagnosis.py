"""The last meaningful line of a log, from logs as vLLM, LiteLLM and pip really write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaclaw_plugin.supervisor.diagnosis import explain, meaningful, read_tail

VLLM_OUT_OF_CACHE = """\
(EngineCore pid=17) INFO 11-22 16:04:40 [core.py:12] Initializing a V1 LLM engine
(EngineCore pid=17) ERROR 11-22 16:04:41 [core.py:99] Traceback (most recent call last):
(EngineCore pid=17) ERROR 11-22 16:04:41 [core.py:99]   File "core.py", line 9, in run
(EngineCore pid=17) ERROR 11-22 16:04:41 [core.py:99] ValueError: No available memory for the cache blocks.
Traceback (most recent call last):
  File "api_server.py", line 3, in <module>
RuntimeError: Engine core initialization failed. See root cause above.
resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects
"""


@pytest.mark.parametrize(
    ("log", "line", "remedy"),
    [
        (
            VLLM_OUT_OF_CACHE,
            "ValueError: No available memory for the cache blocks.",
            "lower metaclaw.vllm.max_model_len",
        ),
        (
            "api_server.py: error: argument --dtype: invalid choice: 'x'\n",
            "argument --dtype",
            "metaclaw.vllm.extra_args",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, User-specified "
            "max_model_len (10000000) is greater than the derived max_model_len (2048)\n    For further information",
            "greater than the derived max_model_len",
            "lower metaclaw.vllm.max_model_len",
        ),
        (
            "ValueError: Free memory on device cuda:0 (3.1/79.0 GiB) on startup is less than desired GPU memory "
            "utilization (0.92, 72.7 GiB). Decrease GPU memory utilization",
            "Free memory on device cuda:0",
            "lower metaclaw.vllm.gpu_memory",
        ),
        ("OSError: [Errno 98] Address already in use\n", "Address already in use", "choose another port"),
        ("RuntimeError: operator torchvision::nms does not exist\n", "torchvision", "pip uninstall"),
        ("safetensors_rust.SafetensorError: HeaderTooLarge\n", "HeaderTooLarge", "fetch them again"),
    ],
)
def test_a_known_cause_comes_with_its_remedy(log: str, line: str, remedy: str) -> None:
    said = explain(log)
    assert line in said
    assert remedy in said
    assert "\n" not in said


def test_an_unknown_error_is_the_last_error_line_and_not_the_noise_after_it() -> None:
    assert explain("starting\nKeyError: 'weights'\nbye\n") == "KeyError: 'weights'"


def test_without_an_error_it_is_the_last_line() -> None:
    assert explain("one\ntwo\n\n") == "two"
    assert explain("") == "it wrote nothing"


def test_prefixes_and_tracebacks_are_left_out() -> None:
    assert meaningful(VLLM_OUT_OF_CACHE)[0] == "Initializing a V1 LLM engine"
    assert not any("Traceback" in line for line in meaningful(VLLM_OUT_OF_CACHE))


def test_only_this_run_of_a_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("old run\nnew run\n")
    assert read_tail(log, start=8) == "new run\n"
    assert read_tail(log, size=4) == "run\n"
    assert read_tail(tmp_path / "none.log") == ""
