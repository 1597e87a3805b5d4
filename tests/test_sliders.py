"""The sliders of notebook 10 in a kernel of their own, moved by the messages that a browser sends."""

import asyncio
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.warm import WarmKernel

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "10_query_masks.ipynb"
GIVEN = "preset, image, interactive, device, progress = 'smoke', '2', True, 'cpu', False"


class Browser:
    """As much of one as sliders need: it runs cells, knows widgets by their descriptions, and sends what moving one sends."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.sliders: dict[str, str] = {}

    async def run(self, source: str) -> list[bytes]:
        return await self._figures(self._client.execute(source))

    async def move(self, slider: str, value: float) -> list[bytes]:
        data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
        message = self._client.session.msg("comm_msg", {"comm_id": self.sliders[slider], "data": data})
        self._client.shell_channel.send(message)
        return await self._figures(message["header"]["msg_id"])

    async def _figures(self, asked: str) -> list[bytes]:
        """The pictures of the answer to a message."""
        found = []
        while True:
            answer = await self._client.get_iopub_msg(timeout=120)
            if answer["parent_header"].get("msg_id") != asked:
                continue
            kind, content = answer["msg_type"], answer["content"]
            assert kind != "error" and content.get("name") != "stderr", content
            state = content["data"].get("state", {}) if kind == "comm_open" else {}
            if state.get("_model_name") in ("IntSliderModel", "FloatSliderModel"):
                self.sliders[state["description"]] = content["comm_id"]
            found += [b64decode(content["data"]["image/png"])] if kind == "display_data" and "image/png" in content["data"] else []
            if kind == "status" and content["execution_state"] == "idle":
                return found


async def drive() -> None:
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    wanted = [cell for cell in cells if any(word in cell for word in ("preset: str", "open_session(**", "query_masks.look", ".explore("))]
    assert len(wanted) == 4
    kernel = WarmKernel(kernel_name="python3")
    await kernel.start_kernel()
    client = kernel.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=120)
        browser = Browser(client)
        await browser.run("from detrdistill.session import open_session")
        first = [await browser.run(source) for source in (wanted[0], GIVEN, *wanted[1:])][-1]
        assert len(first) == 1 and browser.sliders.keys() == {"image", "query, by q", "stage", "gamma"}
        seen = {first[0]}
        for slider, there, back in (("gamma", 0.0, 0.5), ("query, by q", 3, 1), ("stage", 1, 2), ("image", 5, 2)):
            (moved,) = await browser.move(slider, there)
            assert moved not in seen, f"{slider}: another picture than all before"
            seen.add(moved)
            assert await browser.move(slider, back) == first, f"{slider}: back where it was"
    finally:
        client.stop_channels()
        await kernel.shutdown_kernel(now=True)


def test_every_slider_changes_the_figure_and_back(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path / "smoke")
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path))
    asyncio.run(drive())
