"""A folder of small colour pictures in nine classes, to try `--folder` with: emoji, drawn from a font that Debian ships.

python .ci/emoji.py OUT [FONT] [LIST]

FONT is NotoColorEmoji.ttf of the package fonts-noto-color-emoji (SIL Open Font License 1.1), LIST is emoji-test.txt of
unicode-data (Unicode License), which names a group for each emoji. Variants of skin are left out, since the same picture in
five tones would stand on both sides of a split, and so is what the font draws as several pictures, or as another's."""
import re,sys
from pathlib import Path
from PIL import Image,ImageDraw,ImageFont

FONT = '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'
LIST = '/usr/share/unicode/emoji/emoji-test.txt'
SIZE,FULL = 32,109 # pixels of a picture, and of the font's own

def listed(path):
    "`(group, emoji, its number)` of each that is whole and has no tone of skin"
    group = None
    for line in Path(path).read_text(encoding='utf-8').splitlines():
        if line.startswith('# group: '): group = re.sub('[^a-z]+', '-', line[9:].lower())
        elif '; fully-qualified' in line:
            codes = line.split(';')[0].split()
            if not any('1F3FB'<=c<='1F3FF' for c in codes): yield group, ''.join(chr(int(c, 16)) for c in codes), '-'.join(codes).lower()

def draw(text, font):
    "The emoji on white, or None where the font has no single picture for it"
    left,top,right,bottom = font.getbbox(text)
    if not right-left or font.getlength(text)>1.5*font.getlength('\U0001F600'): return None
    im = Image.new('RGB', (right-left, bottom-top), 'white')
    ImageDraw.Draw(im).text((-left, -top), text, font=font, embedded_color=True)
    side = max(im.size)
    square = Image.new('RGB', (side, side), 'white')
    square.paste(im, ((side-im.width)//2, (side-im.height)//2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)

def main(out, font=FONT, names=LIST):
    font,seen,n = ImageFont.truetype(font, FULL, layout_engine=ImageFont.Layout.RAQM),set(),{}
    for group,text,number in listed(names):
        im = draw(text, font)
        if im is None or im.tobytes() in seen: continue
        seen.add(im.tobytes())
        path = Path(out, group, number+'.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        im.save(path)
        n[group] = n.get(group, 0)+1
    print(f'{sum(n.values()):,} pictures in {out}:', ', '.join(f'{k} {v}' for k,v in n.items()))

if __name__=='__main__': main(*sys.argv[1:])
