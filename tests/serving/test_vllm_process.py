"""The process of a vLLM server: its command line, its environment, and its end, however its parent ends."""

import os
import subprocess
import sys
from contextlib import suppress

import httpx2
import psutil
import pytest

from understudy.serving.vllm_process import VLLMProcess, is_alive
from understudy.teacher import TeacherError


def script(tmp_path, text):
    """An interpreter that runs `text` in place of vLLM."""
    (tmp_path / "program.py").write_text(text)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "program.py"} "$@"\n')
    path.chmod(0o755)
    return str(path)


SERVER = """
import os, sys, http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
of_torchrun = [name for name in os.environ if name.startswith("TORCHELASTIC") or name == "LOCAL_RANK"]
print(sys.argv[1:], flush=True)
print(f"devices {os.environ.get('CUDA_VISIBLE_DEVICES')}, of torchrun {of_torchrun}", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_is_started_with_its_options_and_environment_and_ends_when_it_is_told(tmp_path, monkeypatch):
    """Behind a proxy and under torchrun, whose variables are not for the server."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    log = tmp_path / "run" / "vllm.log"
    options = {"options": {"a_b": True}, "env": {"CUDA_VISIBLE_DEVICES": 1}}
    process = VLLMProcess("model", log, python=script(tmp_path, SERVER), **options)
    process.start()
    process.wait_until_ready()
    text = log.read_text()
    assert "'--generation-config', 'vllm', '--a-b'" in text
    assert "devices 1, of torchrun []" in text
    assert httpx2.get(process.url, trust_env=False).status_code == 200
    assert is_alive(process.pid)
    forked = os.dup(process._process.stdin.fileno())  # as a child has it that was forked meanwhile
    process.stop()
    os.close(forked)
    assert not process.is_running
    assert not is_alive(process.pid)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(process.url, trust_env=False)


@pytest.mark.parametrize(
    "end", ["pass", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)"]
)
def test_no_server_is_left_behind_however_its_parent_ends(end, tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from understudy.serving.vllm_process import VLLMProcess
process = VLLMProcess("model", Path({str(tmp_path / "log")!r}), python={script(tmp_path, SERVER)!r})
process.start()
process.wait_until_ready()
print(process._process.pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(20)
    port = (tmp_path / "log").read_text().split("'--port', '")[1].split("'")[0]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}")


def test_a_server_that_cannot_start_is_an_error_with_what_its_log_says(tmp_path):
    python = script(tmp_path, "raise RuntimeError('no memory for the cache')")
    process = VLLMProcess("model", tmp_path / "log", python=python)
    process.start()
    with pytest.raises(TeacherError, match=r"ended before it was ready \(RuntimeError: no memory for the cache\): see"):
        process.wait_until_ready()


CLEANING = """
import os, signal, subprocess, sys, time
if sys.argv[1] != "clean":
    child = subprocess.Popen([sys.executable, __file__, "clean"], stdout=subprocess.PIPE)
    child.stdout.readline()
    print("ready", flush=True)
    time.sleep(60)
def clean(*_):
    time.sleep(0.5)
    open(__file__ + ".cleaned", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, clean)
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_server_leaves_behind_has_the_time_to_free_its_memory(tmp_path):
    """As Python's resource tracker, without which every server that ends would leave some 400 MB in /dev/shm."""
    process = VLLMProcess("model", tmp_path / "log", python=script(tmp_path, CLEANING))
    process.start()
    while "ready" not in (tmp_path / "log").read_text():
        pass
    process.stop()
    assert (tmp_path / "program.py.cleaned").exists()
