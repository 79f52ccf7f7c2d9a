"""Where the emoji pictures, their names and tags come from, and how a picture is drawn from them.

Five npm packages, fetched by npm's own client and checked against the sums below. All are under the MIT licence: the
pictures of Microsoft's Fluent Emoji (the static 3D set as LobeHub publishes it, three styles as Iconify does) and the
names and tags of emojibase. Pictures are composed on white.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

SIDE = 256
STYLES = ("3d", "gradient", "flat", "high contrast")
PACKAGES = {
    "emojibase-data@17.0.0": "62f81be405a81d588757f82ad6aaf96406ab7018a9f81dbbfd92d1b142646e000468b959fdfa1ff60f3cd8b4"
    "e9984a728413440b49b6484988b658c7b13ca08c",
    "@lobehub/fluent-emoji-3d@1.1.0": "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb445d267bba20791"
    "4232a87a10c75ee549d9069e720979c1106feb4954006de1ee",
    "@iconify-json/fluent-emoji@1.2.7": "0fc1ba6ca03222ccb13f5af366d216aff820fdf3b8460d7e0f209695fa8a2b887c5bee049bf6"
    "343fa4188095104e551c6a0cc9bd2ca0fbd381bf8873e0773f40",
    "@iconify-json/fluent-emoji-flat@1.2.6": "458e3b4603dbe3b7d8522cab03ae2c20e2f4f94534dacdbdb17a4d05b2104415253e57c"
    "d1532949990c4446bb10ecffbc8d196a9062fb9a4983353387d15e553",
    "@iconify-json/fluent-emoji-high-contrast@1.2.6": "7acaa164fa64ac5eec357dcdb0ba21f0a5bae28904aff6f3928ed636714ffa"
    "a4c9180a833c3623a74f76e72c6e8af5f2dc7b55401f318482aedfe36ad5bc97e7",
}
NAMES, THREE_D, *DRAWN = PACKAGES
# Light, medium-light, medium, medium-dark, dark: tones of emojibase whose pictures are taken, by style.
TONES = {"3d": (1, 3, 5), "gradient": (), "flat": (1, 3, 5), "high contrast": ()}


@dataclass(frozen=True)
class Emoji:
    """One emoji, or one of its skin tones.

    Attributes:
        code: Code points in hexadecimal, joined by "-", without variation selectors.
        base: Code of the emoji without a skin tone.
        name: Its name in small letters, as people would type it.
        tags: Words that people search it by.
        tone: 0, or the number of its skin tone.
    """

    code: str
    base: str
    name: str
    tags: tuple[str, ...]
    tone: int


def archive_name(package: str) -> str:
    """File name that `npm pack` gives a package "name@version" or "@scope/name@version"."""
    name, version = package.removeprefix("@").rsplit("@", 1)
    return f"{name.replace('/', '-')}-{version}.tgz"


def fetch(folder: Path, packages: Mapping[str, str] = PACKAGES) -> None:
    """Fetches every package that the folder lacks and checks all of them.

    Args:
        folder: Where the packages' files are.
        packages: SHA-512 of each package's file.

    Raises:
        ValueError: If npm fails or a file is not what its sum says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, expected in packages.items():
        path = folder / archive_name(package)
        if not path.is_file():
            result = subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True)
            if result.returncode:
                raise ValueError(f"npm pack {package} failed: {result.stderr.strip()[-300:]}")
        found = hashlib.sha512(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{path} has the SHA-512 {found[:16]}..., expected {expected[:16]}...: remove it")


def plain_code(code: str) -> str:
    """A code as all sources spell it: small letters, no variation selector, no leading zeros."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def plain_name(label: str) -> str:
    """A label as people would type it: small letters, no colon, no quotation marks."""
    straight = label.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = "".join(sign if sign.isalnum() or sign in "-'.&#*+/" else " " for sign in straight)
    return " ".join(kept.split())


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """Every emoji of emojibase that has one skin tone or none, by code."""
    found = {}
    for entry in _json(folder, NAMES, "en/data.json"):
        base, tags = plain_code(entry["hexcode"]), tuple(plain_name(tag) for tag in entry.get("tags", ()))
        for each in (entry, *entry.get("skins", ())):
            tone = each.get("tone", 0)
            if isinstance(tone, int):
                code = plain_code(each["hexcode"])
                found[code] = Emoji(code, base, plain_name(each["label"]), tags, tone)
    return found


def flat_names(folder: Path) -> dict[str, str]:
    """What the flat set calls the emoji that it draws, by code."""
    return {plain_code(code): name for code, name in _json(folder, DRAWN[1], "chars.json").items()}


def wanted_emoji(folder: Path) -> dict[str, Emoji]:
    """The emoji that count, by code: what the flat set draws, so no country flags, which come from elsewhere."""
    drawn = flat_names(folder)
    return {code: each for code, each in read_emoji(folder).items() if code in drawn}


def draw_all(folder: Path) -> Iterator[tuple[Emoji, str, PIL.Image.Image]]:
    """Every picture that is taken: emoji, style, RGB picture of SIDE x SIDE pixels on white."""
    wanted, names = wanted_emoji(folder), flat_names(folder)
    sets = [_json(folder, package, "icons.json") for package in DRAWN]
    with tarfile.open(folder / archive_name(THREE_D)) as archive:
        members = {plain_code(Path(m.name).stem): m for m in archive.getmembers() if m.name.endswith(".webp")}
        for code, each in sorted(wanted.items()):
            if code in members and each.tone in (0, *TONES["3d"]):
                file: Any = archive.extractfile(members[code])
                yield each, STYLES[0], on_white(PIL.Image.open(file))
    for style, icons in zip(STYLES[1:], sets, strict=True):
        for code, each in sorted(wanted.items()):
            if names[code] in icons["icons"] and each.tone in (0, *TONES[style]):
                yield each, style, draw(icons, names[code])


def draw(icons: dict[str, Any], name: str) -> PIL.Image.Image:
    """Picture of an icon of an Iconify set."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}" color="#000"'
    text = f'{head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    data = resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=True)
    return on_white(PIL.Image.open(io.BytesIO(bytes(data))))


def on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture on white, as RGB of SIDE x SIDE pixels."""
    picture = picture.convert("RGBA")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    white = PIL.Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def _json(folder: Path, package: str, name: str) -> Any:
    with tarfile.open(folder / archive_name(package)) as archive:
        file: Any = archive.extractfile(f"package/{name}")
        return json.load(file)
