"""The demo's text and its embedded model."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest

from ptqkit.demo import MODEL_DIR, corpus, files, split_of, text

FOLDER = Path(sysconfig.get_path("stdlib"))
PERPLEXITY_BOUND = 18.0  # measured 8.3 to 10.8 with the sources of Python 3.10 to 3.13
WINDOW = 512


def test_split_depends_on_the_path_alone():
    assert split_of("json/decoder.py") == "train"
    assert split_of("doctest.py") == "calibration"
    assert split_of("pprint.py") == "test"


def test_fractions_of_many_names():
    splits = [split_of(f"package/module_{i}.py") for i in range(20_000)]
    assert 0.04 < splits.count("test") / len(splits) < 0.06
    assert 0.04 < splits.count("calibration") / len(splits) < 0.06


def test_files_are_disjoint_ordered_and_library_code():
    found = {split: files(split) for split in corpus.SPLITS}
    everything = [path for paths in found.values() for path in paths]
    assert len(everything) == len(set(everything)) > 300
    assert len(found["train"]) > 0.8 * len(everything)
    assert found["test"] == files("test") and found["test"] != sorted(found["test"])
    for path in everything:
        assert not {"site-packages", "test", "tests"} & set(path.relative_to(FOLDER).parts)


def test_text_is_cut_where_asked():
    whole = text("calibration")
    assert text("calibration", 5_000) == whole[:5_000]
    varied = text("calibration", per_file=2_000)
    assert varied.endswith("\n") and len(varied) <= 2_000 * len(files("calibration"))


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="validation"):
        files("validation")


def test_library_without_sources_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        text("test", root=tmp_path)


def test_root_with_generated_and_foreign_files(tmp_path):
    names = [
        "os.py",
        "site-packages/a.py",
        "test/b.py",
        "encodings/cp437.py",
        "_sysconfigdata_x.py",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    found = [path.name for split in corpus.SPLITS for path in files(split, tmp_path)]
    assert found == ["os.py"]


def test_model_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) <= 16_000_000


def test_model_predicts_text_it_never_saw():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    offline = {"local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR, **offline)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, **offline)
    assert model.dtype == torch.float16
    unseen = text("test", 20_000)
    ids = tokenizer(unseen)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == unseen
    windows = torch.tensor(ids[1:])[: len(ids[1:]) // WINDOW * WINDOW].view(-1, WINDOW)
    starts = torch.full_like(windows[:, :1], tokenizer.bos_token_id)
    inputs = torch.cat([starts, windows[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model.float().eval()(input_ids=inputs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.flatten())
    assert math.exp(loss) < PERPLEXITY_BOUND
