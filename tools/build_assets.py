"""Draw the sprite sheets of the small world from two emoji artworks. Run only to change the concepts.

    python tools/build_assets.py --noto DIR --fluent DIR --emojibase DIR

Each DIR is an unpacked npm package (`npm pack @iconify-json/noto @lobehub/fluent-emoji-3d emojibase-data`).
Needs `pip install resvg-py pillow numpy`. Writes mmrpt/world/assets/{noto,fluent}.png and concepts.json.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # side of one sprite in pixels
COLUMNS = 16
OUT = Path(__file__).parent.parent / "mmrpt/world/assets"

# category: name and emoji, one word each and singular, so that no article or verb gives a name away. Left out: people,
# flags, clock faces, keycaps, symbols, and all but one of each family of look-alikes (moons, hearts, books, phones).
CONCEPTS = """
animal: monkey 🐒 gorilla 🦍 dog 🐶 wolf 🐺 fox 🦊 cat 🐱 lion 🦁 tiger 🐅 horse 🐎 unicorn 🦄 zebra 🦓 deer 🦌
animal: cow 🐄 pig 🐷
animal: camel 🐫 giraffe 🦒 elephant 🐘 hamster 🐹 rabbit 🐇 squirrel 🐿 bat 🦇 bear 🐻 koala 🐨 panda 🐼 sloth 🦥
animal: kangaroo 🦘 frog 🐸 crocodile 🐊 turtle 🐢 snake 🐍 dragon 🐉 dinosaur 🦕 snail 🐌 spider 🕷 scorpion 🦂 whale 🐳
animal: dolphin 🐬 fish 🐟 shark 🦈 octopus 🐙 jellyfish 🪼 crab 🦀 shrimp 🦐
bird: turkey 🦃 rooster 🐓 penguin 🐧 eagle 🦅 duck 🦆 swan 🦢 owl 🦉 flamingo 🦩 peacock 🦚 parrot 🦜
insect: butterfly 🦋 ant 🐜 bee 🐝 ladybug 🐞
plant: rose 🌹 tulip 🌷 sunflower 🌻 hibiscus 🌺 cactus 🌵 palm 🌴 pine 🌲 clover 🍀 mushroom 🍄 bouquet 💐
fruit: grape 🍇 watermelon 🍉 lemon 🍋 banana 🍌 pineapple 🍍 apple 🍎 pear 🍐 peach 🍑 cherry 🍒 strawberry 🍓
fruit: blueberry 🫐 kiwi 🥝 coconut 🥥
vegetable: tomato 🍅 avocado 🥑 eggplant 🍆 carrot 🥕 corn 🌽 chili 🌶 pepper 🫑 cucumber 🥒 lettuce 🥬 broccoli 🥦
vegetable: garlic 🧄 onion 🧅
food: bread 🍞 croissant 🥐 pretzel 🥨 pancake 🥞 waffle 🧇 cheese 🧀 burger 🍔 pizza 🍕 sandwich 🥪 taco 🌮 popcorn 🍿
food: sushi 🍣
sweet: donut 🍩 cookie 🍪 cake 🎂 cupcake 🧁 chocolate 🍫 candy 🍬 lollipop 🍭 honey 🍯
drink: milk 🥛 coffee ☕ wine 🍷 beer 🍺
building: house 🏠 factory 🏭 castle 🏰 mosque 🕌 fountain ⛲ tent ⛺
nature: volcano 🌋 mountain 🏔 rainbow 🌈 sun ☀ moon 🌙 star ⭐ cloud ☁ tornado 🌪 snowflake ❄ fire 🔥 droplet 💧 rock 🪨
vehicle: airplane 🛩 helicopter 🚁 rocket 🚀 ufo 🛸 train 🚂 bus 🚌 ambulance 🚑 taxi 🚕 truck 🚚 motorcycle 🏍 bicycle 🚲
vehicle: sailboat ⛵ canoe 🛶 ship 🚢 parachute 🪂
toy: balloon 🎈 kite 🪁 dice 🎲 joystick 🕹 puzzle 🧩 teddy 🧸 baseball ⚾ basketball 🏀 football 🏈 snowman ⛄
treasure: trophy 🏆 medal 🏅 gift 🎁 gem 💎 crown 👑
clothing: shirt 👕 scarf 🧣 dress 👗 sneaker 👟 boot 👢 hat 👒 cap 🧢 umbrella ☂ purse 👛 backpack 🎒
instrument: saxophone 🎷 trumpet 🎺 accordion 🪗 guitar 🎸 piano 🎹 violin 🎻 drum 🥁 bell 🔔
tool: hammer 🔨 axe 🪓 bomb 💣 shield 🛡 screwdriver 🪛 gear ⚙ magnet 🧲 ladder 🪜 broom 🧹 bucket 🪣 basket 🧺 key 🔑
tool: lock 🔒 anchor ⚓ compass 🧭 hourglass ⌛
stationery: pencil ✏ paintbrush 🖌 crayon 🖍 book 📖 map 🗺 envelope ✉
device: microscope 🔬 telescope 🔭 laptop 💻 camera 📷 television 📺 radio 📻 telephone ☎ candle 🕯 bulb 💡 lantern 🏮
device: battery 🔋 microphone 🎤 clock ⏰ globe 🌍
furniture: door 🚪 window 🪟 bed 🛏 couch 🛋 chair 🪑 toilet 🚽
"""


def read_concepts() -> list[dict[str, str]]:
    """The table above as rows of name, category and code point (lower case hex, without FE0F)."""
    rows = []
    for line in CONCEPTS.strip().splitlines():
        category, _, rest = line.partition(":")
        words = rest.split()
        for name, emoji in zip(words[::2], words[1::2], strict=True):
            code = "-".join(f"{ord(c):x}" for c in emoji if ord(c) != 0xFE0F)
            rows.append({"name": name, "category": category, "code_point": code})
    names = [row["name"] for row in rows]
    codes = [row["code_point"] for row in rows]
    if len(set(names)) != len(names) or len(set(codes)) != len(codes):
        twice = sorted({x for x in names + codes if (names + codes).count(x) > 1})
        raise ValueError(f"listed twice: {', '.join(twice)}; names and emoji must be distinct")
    return sorted(rows, key=lambda row: row["name"])


def join_key(code: str) -> str:
    """Code points as one key for all three packages: lower case, four digits at least, without FE0F."""
    return "-".join(f"{int(part, 16):x}" for part in code.replace("_", "-").split("-") if part.lower() != "fe0f")


def fit(image: Image.Image) -> Image.Image:
    """Crop to what is drawn, scale its longer side to SIZE - 2, and centre it on a clear square."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    scale = (SIZE - 2) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    sprite = Image.new("RGBA", (SIZE, SIZE))
    sprite.paste(image, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return sprite


def noto_sprites(folder: Path, codes: list[str]) -> list[Image.Image]:
    import resvg_py

    chars = {join_key(code): name for code, name in json.loads((folder / "chars.json").read_text()).items()}
    icons = json.loads((folder / "icons.json").read_text())
    sprites = []
    for code in codes:
        icon = icons["icons"][chars[code]]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        svg = svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
        png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
        sprites.append(fit(Image.open(io.BytesIO(bytes(png)))))
    return sprites


def fluent_sprites(folder: Path, codes: list[str]) -> list[Image.Image]:
    files = {join_key(path.stem): path for path in (folder / "assets").glob("*.webp")}
    return [fit(Image.open(files[code])) for code in codes]


def sheet(sprites: list[Image.Image]) -> Image.Image:
    rows = -(-len(sprites) // COLUMNS)
    page = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
    for i, sprite in enumerate(sprites):
        page.paste(sprite, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    return page


def look_alikes(sprites: list[Image.Image], rows: list[dict[str, str]], count: int) -> list[tuple[float, str, str]]:
    """The pairs whose 16 x 16 thumbnails on grey differ least: candidates to leave out."""
    thumbs = []
    for sprite in sprites:
        page = Image.new("RGBA", sprite.size, (160, 160, 160, 255))
        page.alpha_composite(sprite)
        thumbs.append(np.asarray(page.convert("RGB").resize((16, 16), Image.Resampling.BOX), float).ravel())
    x = np.stack(thumbs)
    squares = (x * x).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0) / x.shape[1])
    first, second = np.triu_indices(len(rows), 1)
    order = np.argsort(distance[first, second])[:count]
    return [(distance[first[k], second[k]], rows[first[k]]["name"], rows[second[k]]["name"]) for k in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("noto", "fluent", "emojibase"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = read_concepts()
    labels = {join_key(e["hexcode"]): e["label"] for e in json.loads((args.emojibase / "en/data.json").read_text())}
    for row in rows:
        row["label"] = labels[row["code_point"]]
    codes = [row["code_point"] for row in rows]
    styles = {"noto": noto_sprites(args.noto, codes), "fluent": fluent_sprites(args.fluent, codes)}
    args.out.mkdir(parents=True, exist_ok=True)
    for style, sprites in styles.items():
        path = args.out / f"{style}.png"
        sheet(sprites).save(path, optimize=True)
        print(f"{path.name}: {len(sprites)} sprites, {path.stat().st_size / 1e6:.2f} MB")
        for distance, a, b in look_alikes(sprites, rows, 20):
            print(f"  {distance:6.1f}  {a} / {b}")
    text = "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n"
    (args.out / "concepts.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
