"""python tests/pictures.py: README's pictures and output, from the kept example and the 72-GPU plan (Chromium draws the card)."""

import re

from example import EXAMPLE
from PIL import Image, PngImagePlugin

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.experiment.parameters import Experiment
from disagg_lib.files import REPOSITORY
from disagg_lib.notebook.pictures import topology_svg
from disagg_lib.sharing.report import Report, make_report

PICTURES = REPOSITORY / "docs/pictures"
RACK = "params/gb200_72gpu.yaml"
CARD = {"light": "report.png", "dark": "report_dark.png"}
CHROMIUM = "/usr/bin/chromium"


def rack() -> Experiment:
    return load_experiment([RACK])


def readme_blocks(report: Report) -> dict[str, str]:
    """What stands between README's marks: the pictures with their findings, and what the demo prints at its end."""
    topology = f"The 72-GPU topology: {rack().num_ctx_servers} context and {rack().num_gen_servers} generation servers"
    pictures = f"""<picture><source media="(prefers-color-scheme: dark)" srcset="docs/pictures/{CARD["dark"]}">
<img width="58%" src="docs/pictures/{CARD["light"]}" alt="The report of a run: {report.title}"></picture>
<img width="40%" src="docs/pictures/topology_72gpu.svg" alt="{topology}">"""
    verdict, *_, line = report.text().split("\n\n")
    return {"pictures": pictures, "output": f"```\n{verdict}\n...\n{line}\n```"}


def renewed(readme: str, blocks: dict[str, str]) -> str:
    """README with its marked blocks anew."""
    for name, text in blocks.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = between.sub(lambda mark, text=text: f"{mark[1]}{text}\n{mark[2]}", readme)
    return readme


def draw_cards(report: Report) -> None:
    """The card as a browser shows it, light and dark; the run in one line stands inside the file."""
    from playwright.sync_api import sync_playwright

    page_text = report.html(
        page=True,
        pictures=[],
        given=[],
        settings="",
        versions="",
        left_out=[],
        repeat="",
        notebooks=[],
        footnote="",
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, name in CARD.items():
            page = browser.new_page(
                viewport={"width": 1064, "height": 900}, color_scheme=scheme, device_scale_factor=1.5
            )
            page.set_content(page_text)
            limits = page.locator(".disagg-report .box").first.bounding_box()
            whole = {"x": 0, "y": 0, "width": 1064, "height": limits["y"] + limits["height"] + 14}
            page.screenshot(path=PICTURES / name, clip=whole)
            said = PngImagePlugin.PngInfo()
            said.add_text("Description", report.title)
            with Image.open(PICTURES / name) as picture:
                small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
            small.save(PICTURES / name, optimize=True, pnginfo=said)
        browser.close()


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    example = make_report(EXAMPLE)
    draw_cards(example)
    (PICTURES / "topology_72gpu.svg").write_text(topology_svg(rack()) + "\n", encoding="utf-8")
    readme = REPOSITORY / "README.md"
    readme.write_text(renewed(readme.read_text(encoding="utf-8"), readme_blocks(example)), encoding="utf-8")
