"""From the data section to what is read: blends, splits, corpora of their own for validation and test."""

import numpy as np
import pytest

from seqlen_curriculum import ConfigError, DataError, RunConfig
from seqlen_curriculum.data.from_config import open_run_data, open_samples
from seqlen_curriculum.data.writer import CorpusWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corpora of ten documents of 10, 20 and 30 tokens each."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, length in (("a", 10), ("b", 20), ("c", 30)):
        with CorpusWriter(folder / name, 100) as writer:
            for _ in range(10):
                writer.add_document(np.arange(length))
    return folder


def run(folder, **data):
    given = {"train": [str(folder / "a"), str(folder / "b")], "seq_length": 4, **data}
    return RunConfig.from_dict(
        {
            "train_batch_size": 2,
            "model": {"preset": "tiny-200k", "vocab_size": 100},
            "data": given,
            "training": {"train_tokens": 100},
        }
    )


def spans(samples):
    return [(first, end) for _, first, end in samples.ranges]


def test_a_list_is_one_source_and_is_split(folder):
    train, valid = open_run_data(run(folder, split="80,10,10"))
    assert [spans(source) for source in train.sources] == [[(0, 80), (0, 160)]]
    assert spans(valid) == [(80, 90), (160, 180)]
    assert spans(open_samples(run(folder, split="80,10,10"), "test")) == [(90, 100), (180, 200)]
    assert not train.recycle


def test_a_blend_is_a_source_each(folder):
    blend = [[3, str(folder / "a")], [1, str(folder / "b")]]
    config = run(folder, train=blend, split="80,10,10", leftovers="recycle")
    train, valid = open_run_data(config)
    assert [spans(source) for source in train.sources] == [[(0, 80)], [(0, 160)]]
    assert train.blend.shares == [3, 1]
    assert spans(valid) == [(80, 90), (160, 180)]
    assert train.recycle
    assert config.settings()["data.weights"] == [3.0, 1.0]


def test_corpora_of_their_own_for_validation_and_test(folder):
    config = run(folder, valid=[str(folder / "c")])
    train, valid = open_run_data(config)
    assert spans(train.sources[0]) == [(0, 100), (0, 200)]
    assert spans(valid) == [(0, 300)]
    with pytest.raises(ConfigError, match=r"data.test: not given; .* give corpora for data.test"):
        open_samples(config, "test")
    config = run(folder, test=[str(folder / "c")], split="80,20")
    assert spans(open_run_data(config)[0].sources[0]) == [(0, 80), (0, 160)]
    assert spans(open_samples(config, "test")) == [(0, 300)]


def test_a_vocabulary_larger_than_the_models_is_found_in_validation_too(folder):
    with CorpusWriter(folder / "d", 200) as writer:
        writer.add_document([*range(150, 160)])
    with pytest.raises(DataError, match=r"d: token 0 has id 150, outside the vocabulary of 100"):
        open_run_data(run(folder, valid=[str(folder / "d")]))


def test_settings_do_not_depend_on_the_folder(folder):
    settings = run(folder, valid=[str(folder / "c")]).settings()
    assert settings == run(folder, train=["elsewhere/a", "elsewhere/b"], valid=["elsewhere/c"]).settings()
    assert settings != run(folder, valid=["c"], leftovers="recycle").settings()
    with pytest.raises(ConfigError, match="valid"):
        run(folder, valid=[])


def test_a_corpus_given_twice_under_different_names(folder):
    again = [str(folder / "a"), str(folder / "x" / ".." / "a.bin")]
    with pytest.raises(ConfigError, match=r"data: train names .*a.bin' twice; .* keep one"):
        run(folder, train=again)
    with pytest.raises(ConfigError, match=r"data: valid names .*b.idx', which train names too; keep it in one of them"):
        run(folder, valid=[str(folder / "b.idx")])
    with pytest.raises(ConfigError, match=r"data: test names .*c', which valid names too"):
        run(folder, valid=[str(folder / "c")], test=[str(folder / "c")])
