"""A real ComfyUI as a server, with the nodes of visattn and one that makes a tiny model.

`VISATTN_COMFYUI=CHECKOUT python -m tests.support.comfy_server PICTURE.png` draws the graph in a browser.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from scripts.pages import ROOT

CHECKOUT = os.environ.get("VISATTN_COMFYUI", "")
# ComfyUI's own requirements may live in another environment than the one that runs the tests.
PYTHON = os.environ.get("VISATTN_COMFYUI_PYTHON", sys.executable)

NODE = '''
from .comfy_real import KINDS, built, conditioned
import torch

class Tiny:
    """A tiny model with random weights, two prompts and empty latents."""

    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION, CATEGORY = "make", "visattn"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(KINDS),)}}

    def make(self, kind):
        shape, _, text = KINDS[kind]
        return built(kind), *conditioned(text), {"samples": torch.zeros(shape)}

NODE_CLASS_MAPPINGS = {"VisattnTiny": Tiny}
NODE_DISPLAY_NAME_MAPPINGS = {"VisattnTiny": "Tiny model"}
WEB_DIRECTORY = "./web"
'''

SCRIPT = """
import { app } from "../../scripts/app.js";
app.registerExtension({
  name: "visattn.tiny",
  async setup() {
    setTimeout(async () => {
      const graph = await (await fetch("/extensions/visattn_tiny/graph.json")).json();
      await app.loadApiJson(graph, "visattn");
      const places = {
        VisattnTiny: [0, 0, 250, 130], VisattnSparseAttention: [300, 0, 300, 230], KSampler: [650, 0, 280, 270],
        VisattnAttentionReport: [980, 0, 230, 80], PreviewAny: [980, 150, 640, 300],
        PreviewImage: [1260, -280, 360, 400], SaveLatent: [650, 340, 280, 60],
      };
      for (const node of app.graph._nodes) {
        const [x, y, width, height] = places[node.type];
        node.pos = [x, y];
        node.setSize([width, height]);
      }
      app.canvas.ds.scale = 0.85;
      app.canvas.ds.offset = [40, 390];
      await app.queuePrompt(0, 1);
      // Time stands still for the browser while it waits for an answer.
      for (let queue = null; !queue || queue.queue_running.length + queue.queue_pending.length; ) {
        queue = await (await fetch("/queue")).json();
      }
      // The node asks for its picture when it is drawn, after the run.
      const preview = app.graph._nodes.find((node) => node.type === "PreviewImage");
      for (let left = 200; left && !preview.imgs?.every((image) => image.complete); left--) {
        await new Promise((wait) => setTimeout(wait, 50));
        await fetch("/queue");
      }
    }, 3000);
  },
});
"""


def graph(kind="flux", pattern="na(window=3)", sparse=True):
    """A workflow in the API's form: a tiny model, sampled, with its report where it is sparse."""
    model = ["2", 0] if sparse else ["1", 0]
    nodes = {"1": ("VisattnTiny", {"kind": kind})}
    if sparse:
        given = {"pattern": pattern, "start_percent": 0.0, "end_percent": 1.0, "layers": "", "min_tokens": 0}
        nodes["2"] = ("VisattnSparseAttention", {"model": ["1", 0], **given, "backend": "tiles", "strict": True})
        nodes["4"] = ("VisattnAttentionReport", {"model": model, "latent": ["3", 0]})
        nodes["5"] = ("PreviewAny", {"source": ["4", 1]})
        nodes["6"] = ("PreviewImage", {"images": ["4", 2]})
    sampler = {"seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    given = {"model": model, "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["1", 3]}
    nodes["3"] = ("KSampler", {**sampler, **given})
    nodes["7"] = ("SaveLatent", {"samples": ["4", 0] if sparse else ["3", 0], "filename_prefix": "tiny"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in sorted(nodes.items())}


class Server:
    """A running ComfyUI.

    Attributes:
        url: Where it listens.
        base: Its folder of nodes and outputs.
    """

    def __init__(self, url: str, base: Path) -> None:
        self.url, self.base = url, base

    def get(self, path: str, body: object = None):
        """What it answers, an error's body included."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def run(self, workflow):
        """The history of a workflow once it is done, or what is wrong with it."""
        answer = self.get("/prompt", {"prompt": workflow})
        if "prompt_id" not in answer:
            return answer
        for _ in range(240):
            found = self.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
            if found is not None and (found["status"]["completed"] or found["status"]["status_str"] == "error"):
                return found
            time.sleep(0.5)
        raise TimeoutError(f"{workflow} is not done after two minutes")


def write(base: Path) -> None:
    """The folder that a server starts in: the nodes of visattn as its users get them, and the tiny model's."""
    web = base / "custom_nodes" / "visattn_tiny" / "web"
    web.mkdir(parents=True)
    (web.parent / "__init__.py").write_text(NODE)
    # The checkout has a package "tests" of its own.
    shutil.copy(ROOT / "tests/support/comfy_real.py", web.parent)
    (web / "load.js").write_text(SCRIPT)
    (web / "graph.json").write_text(json.dumps(graph()))
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}))
    subprocess.run([PYTHON, "-m", "visattn", "comfy", str(base)], check=True, cwd=ROOT, env=environment())


def environment():
    """In which ComfyUI finds the package under test."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serving(base: Path):
    """A server of the checkout, which is left as it is; ended with the block."""
    write(base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON,
        "main.py",
        "--cpu",
        "--use-pytorch-cross-attention",
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    log = base / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Server(f"http://127.0.0.1:{port}", base)
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError):
                server.get("/queue")
                break
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def picture(server: Server, target: Path) -> None:
    """A screenshot of the graph in a browser, after it ran; the text of its report is in the file beside the pixels."""
    from PIL import Image, PngImagePlugin

    from tests.support.browser import CHROMIUM

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1500,800"]
    options += [f"--user-data-dir={server.base / 'profile'}", "--virtual-time-budget=40000", f"--screenshot={target}"]
    subprocess.run([CHROMIUM, *options, server.url], check=True, capture_output=True, timeout=300)
    (ran,) = server.get("/history").values()
    beside = PngImagePlugin.PngInfo()
    beside.add_text("Report", ran["outputs"]["5"]["text"][0])
    with Image.open(target) as shot:
        shot.convert("RGB").save(target, pnginfo=beside, optimize=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve().parent / "comfy-base"
    with serving(folder) as running:
        picture(running, Path(sys.argv[1]).resolve())
    shutil.rmtree(folder)
