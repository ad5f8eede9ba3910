"""The id that begins a document is what the tokenizer says, in the model and in what is scored."""

import io
import itertools
import json
import struct

import numpy as np
import pytest
import sentencepiece as spm
import torch
import zstandard
from conftest import compose_documents, run_main, shard_bytes

import train_gpt as tg

VOCAB = 512
# Of the ids of the challenge's tokenizers, none is in its place.
ELSEWHERE = {"pad_id": 4, "bos_id": 7, "eos_id": 3, "unk_id": 0}


def train(path, **ids):
    """A tokenizer with its control pieces at these ids."""
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False}
    options |= {"hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    texts = iter(compose_documents())
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=VOCAB, **options, **ids
    )
    path.write_bytes(model.getvalue())
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


class Data:
    """Shards of a tokenizer, and the settings of a tiny run on them."""

    def __init__(self, root, **ids):
        self.sp, self.folder = train(root / "other.model", **ids), root / "shards"
        self.folder.mkdir()
        encoded = [[max(self.sp.bos_id(), 0), *i] for i in self.sp.encode(compose_documents(60))]
        self.val = np.concatenate(encoded[:10]).astype(np.uint16)
        (self.folder / "fineweb_val_000000.bin").write_bytes(shard_bytes(self.val))
        train_tokens = np.concatenate(encoded[10:])
        (self.folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(train_tokens))
        places = {"DATA_PATH": self.folder, "TOKENIZER_PATH": root / "other.model"}
        self.places = {name: str(path) for name, path in places.items()}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Data:
    return Data(tmp_path_factory.mktemp("elsewhere"), **ELSEWHERE)


STACK = {"SMEAR_GATE": "1", "BIGRAM_BUCKETS": "64", "BIGRAM_DIM": "16", "ITERATIONS": "2"}


@pytest.fixture
def env(elsewhere, tiny_env):
    return tiny_env | elsewhere.places | STACK


def nll_of(env, tmp_path, **changed):
    """The NLL of each scored token of an artifact."""
    path = tmp_path / "nll.npy"
    scoring = {"EVAL_ONLY": "1", "SAVE_NLL": str(path), "RUN_ID": "score"}
    run_main(env | scoring | changed)
    return np.load(path)


@pytest.fixture
def artifact(env, tmp_path):
    run_main(env)
    return tmp_path / "logs" / "tiny" / "final_model.artifact"


def test_documents_are_isolated_at_the_tokenizers_bos(env, artifact, elsewhere, tmp_path):
    """The score of a document among others is that of the document alone."""
    given = {"ARTIFACT": str(artifact), "EVAL_DOC_ISOLATED": "1"}
    together = nll_of(env, tmp_path, **given)
    starts = [*np.flatnonzero(elsewhere.val == ELSEWHERE["bos_id"]), len(elsewhere.val)]
    alone = tmp_path / "alone"
    alone.mkdir()
    for begin, end in list(itertools.pairwise(starts))[:3]:
        (alone / "fineweb_val_000000.bin").write_bytes(shard_bytes(elsewhere.val[begin:end]))
        expected = nll_of(env, tmp_path, **given, DATA_PATH=str(alone))
        np.testing.assert_allclose(together[begin : end - 1], expected, atol=1e-5)


def test_the_model_parts_documents_at_the_tokenizers_bos():
    """Nothing of what is before BOS is mixed into it or hashed with it, and no other id is BOS."""
    hp = tg.Hyperparameters(
        bos=7, vocab_size=16, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1,
        smear_gate=1, bigram_buckets=8, bigram_dim=4, train_seq_len=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tg.build_model(hp)
    torch.nn.init.normal_(model.bigram.table.weight)
    found = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    for before in (2, 3):
        for begin in (7, 1):
            inputs = torch.tensor([[9, before, begin, 5]])
            model(inputs, inputs)
    torch.testing.assert_close(found[0][:, 2], found[2][:, 2])
    assert not torch.allclose(found[1][:, 2], found[3][:, 2])


def header_of(path) -> dict:
    """The header of an artifact."""
    data = path.read_bytes()
    size = struct.unpack("<6sHII", data[:16])[2]
    return json.loads(zstandard.ZstdDecompressor().stream_reader(data[48:]).read(size))


def test_the_artifact_carries_it(artifact, env):
    assert header_of(artifact)["bos"] == ELSEWHERE["bos_id"]
    hp = tg.Hyperparameters(tokenizer_path=env["TOKENIZER_PATH"], vocab_size=VOCAB)
    assert tg.load_artifact(artifact, hp)[0].bos == ELSEWHERE["bos_id"]


def test_an_artifact_that_does_not_tell_it_was_made_when_it_was_1(env, tmp_path, monkeypatch):
    """It must be scored as it was trained, whatever the tokenizer says."""
    dumps = json.dumps

    def without(value, **options):
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k != "bos"}
        return dumps(value, **options)

    monkeypatch.setattr(tg.json, "dumps", without)
    run_main(env)
    path = tmp_path / "logs" / "tiny" / "final_model.artifact"
    monkeypatch.undo()
    hp = tg.Hyperparameters(tokenizer_path=env["TOKENIZER_PATH"], vocab_size=VOCAB)
    assert tg.load_artifact(path, hp)[0].bos == 1


def test_scoring_the_artifact_gives_the_score_of_the_run(env, artifact, tmp_path):
    nll = nll_of(env, tmp_path, ARTIFACT=str(artifact))
    log = (tmp_path / "logs" / "tiny.txt").read_text()
    final = float(log[log.rindex("_exact val_loss:") :].split()[1].removeprefix("val_loss:"))
    assert nll.mean(dtype=np.float64) == pytest.approx(final, abs=1e-6)


def test_a_sidecar_counts_nothing_for_the_tokenizers_bos(env, elsewhere, tmp_path):
    folder = tmp_path / "sidecar"
    folder.mkdir()
    for path in elsewhere.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    begins = elsewhere.val == ELSEWHERE["bos_id"]
    sidecar = folder / "fineweb_val_bytes_000000.bin"
    sidecar.write_bytes(shard_bytes(np.where(begins, 0, 2)))
    run_main(env | {"DATA_PATH": str(folder), "RUN_ID": "right"})
    sidecar.write_bytes(shard_bytes(np.where(begins, 1, 2)))
    with pytest.raises(tg.UserError, match="counts bytes for BOS"):
        run_main(env | {"DATA_PATH": str(folder), "RUN_ID": "wrong"})


NEEDY = ["SMEAR_GATE", "BIGRAM_BUCKETS", "EVAL_DOC_ISOLATED", "TRAIN_DOC_ISOLATED"]


@pytest.mark.parametrize("name", NEEDY)
def test_what_needs_documents_is_refused_where_there_are_none(name, tiny_env, tmp_path):
    """A tokenizer without BOS, whose shards have no borders of documents either."""
    data = Data(tmp_path, **ELSEWHERE | {"bos_id": -1})
    env = tiny_env | data.places | {"ITERATIONS": "1"}
    run_main(env)
    rule = r"\*_DOC_ISOLATED, SMEAR_GATE and BIGRAM_BUCKETS need documents that begin with BOS"
    with pytest.raises(tg.UserError, match=rule):
        run_main(env | {name: "2" if name == "BIGRAM_BUCKETS" else "1", "RUN_ID": "parted"})


# ---- what is given is given


@pytest.mark.parametrize(("name", "trained"), [("EVAL_STRIDE", "16"), ("EVAL_DOC_ISOLATED", "1")])
@pytest.mark.parametrize("place", ["environment", "CONFIG"])
def test_a_setting_of_scoring_can_be_switched_off(place, name, trained, tiny_env, tmp_path):
    """0 is a value: the artifact's own counts only where nothing was given."""
    run_main(tiny_env | {name: trained})
    artifact = str(tmp_path / "logs" / "tiny" / "final_model.artifact")
    off = {name: "0"}
    if place == "CONFIG":
        (tmp_path / "off.env").write_text(f"{name}=0\n")
        off = {"CONFIG": str(tmp_path / "off.env")}
    own = nll_of(tiny_env, tmp_path, ARTIFACT=artifact)
    switched = nll_of(tiny_env, tmp_path, ARTIFACT=artifact, **off)
    run_main(tiny_env | {"RUN_ID": "never"})
    never = str(tmp_path / "logs" / "never" / "final_model.artifact")
    expected = nll_of(tiny_env, tmp_path, ARTIFACT=never)
    assert switched.tolist() == expected.tolist()
    assert own.tolist() != expected.tolist()
