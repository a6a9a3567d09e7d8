"""The standard metrics beside pytorch-fid and open_clip: same random weights, same images.

    pip install pytorch-fid "scipy<1.16" open_clip_torch ftfy regex       (by hand; no dependency)
    OMP_NUM_THREADS=1 python tests/peers.py
"""
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import pytorch_fid.inception
import torch
from PIL import Image
from pytorch_fid.fid_score import calculate_fid_given_paths

import test_05_standard as drawn
from common import s5

CAPTIONS = ["hello world", "A photo of 2 dogs!!", "it's 1999", "It’s naïve café", "tom &amp; jerry",
            "10²", "😀", "you should've", "x" * 400, "the quick brown fox " * 30,
            "Über straße 中文 текст", "3.14% of $5 — “quoted”"]


class Judge(s5.StandardJudge):
    """The judge with networks made here instead of read from files."""

    def __init__(self, inception, visual):
        self.inception, self.device, self.size = inception, "cpu", 224
        self.clip = type("Towers", (), {"visual": staticmethod(visual)})()


def look_at(judge, folder):
    """Mean and covariance of the features of the pictures in a folder."""
    images = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
              for file in sorted(folder.iterdir())]
    x = torch.stack(images) / 127.5 - 1
    return s5.moments(torch.cat([judge.embed_images(part)[0] for part in x.split(50)]))


def compare_fid(folder, count=100):
    net = drawn.calibrate(s5.build_inception())
    torch.save(net.state_dict(), folder / "inception.pth")
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: torch.load(
        folder / "inception.pth")
    net.fc = torch.nn.Identity()
    for name, seed in (("a", 1), ("b", 2)):
        (folder / name).mkdir()
        images = drawn.make_images(count, 96, torch.Generator().manual_seed(seed))
        for k, image in enumerate(images.float() * (1 if name == "a" else 0.9)):
            pixels = image.byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name / f"{k:04d}.png")
    judge = Judge(net, lambda x: torch.ones(len(x), 4))
    paths = folder / "a", folder / "b"
    ours = s5.frechet_distance(*look_at(judge, paths[0]), *look_at(judge, paths[1]))
    theirs = calculate_fid_given_paths([*map(str, paths)], 50, "cpu", 2048, 0)
    print(f"FID {ours:.6f}, pytorch-fid {theirs:.6f}, relative {abs(ours / theirs - 1):.1e}")


@torch.no_grad()
def compare_clip():
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms("ViT-B-32-quickgelu")
    for p in model.parameters():
        p += 0.2 * torch.randn(p.shape) * (p.dim() < 2)
    state = {name: value for name, value in model.eval().state_dict().items()
             if name != "attn_mask"}
    judge = Judge(lambda x: torch.zeros(len(x), 1), None)
    judge.clip = s5.Clip().eval()
    judge.clip.load_state_dict(s5.rename_parts(state))
    judge.tokenize = s5.ClipTokenizer(next(Path(open_clip.__file__).parent.glob("bpe*")))
    ids = open_clip.get_tokenizer("ViT-B-32-quickgelu")(CAPTIONS)
    images = [drawn.make_images(1, size, torch.Generator().manual_seed(size))[0]
              for size in (96, 224, 300, 512)]
    files = torch.stack([prepare(Image.fromarray(image.permute(1, 2, 0).numpy()))
                         for image in images])
    seen = torch.cat([judge.embed_images(image[None] / 127.5 - 1)[1] for image in images])
    cosines = seen @ judge.embed_captions(CAPTIONS).T
    theirs = model.encode_image(files, normalize=True) @ model.encode_text(ids, normalize=True).T
    equal = (judge.tokenize(CAPTIONS) == ids).all(1).sum()
    print(f"captions with equal token ids: {equal} of {len(CAPTIONS)}; cosines differ by at most "
          f"{(cosines - theirs).abs().max():.1e}")


if __name__ == "__main__":
    compare_clip()
    with tempfile.TemporaryDirectory() as folder_:
        compare_fid(Path(folder_))
