"""Texts that end a response are found in what its tokens mean, however the text is cut into tokens."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from protocols.roles import Sampling
from workers.data.tokenizer import Tokenizer
from workers.data.vocabulary import ALL_TOKENS
from workers.generation.stop_texts import StopTexts

SPECIAL = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small byte-level BPE: tokens are parts of words, or of characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=[SPECIAL])  # type: ignore[call-arg]
    tokenizer.train_from_iterator(["the answer </answer> is wörld \N{SLIGHTLY SMILING FACE}"] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def ended_after(tokenizer: Tokenizer, text: str, stop: list[str], min_tokens: int = 0) -> str | None:
    """The text of the tokens up to the one that completes a stop text; None if none does."""
    ids = tokenizer.encode([text])[0].tolist()
    search = StopTexts(tokenizer, stop, min_tokens)
    for count, token in enumerate(ids, 1):
        if search.completed_by(token):
            return tokenizer.decode([ids[:count]], special=True)[0]
    return None


@pytest.mark.parametrize("text", ["</answer>", "\n\n", "r>", " is", "wörld", "\N{SLIGHTLY SMILING FACE}" * 2, SPECIAL])
def test_a_text_is_found_wherever_tokens_are_cut(tokenizer: Tokenizer, text: str):
    assert ended_after(tokenizer, f"so it{text}more{text}", [text, "never"]) == f"so it{text}"


def test_the_token_that_completes_a_text_is_whole(tokenizer: Tokenizer):
    assert "answer" in {tokenizer.token_of(i) for i in range(290)}
    assert ended_after(tokenizer, "an</answer>", ["</ans"]) == "an</answer"


def test_a_response_without_the_text_goes_on(tokenizer: Tokenizer):
    assert ended_after(tokenizer, "</answer </answe r>", ["</answer>"]) is None


def test_a_text_among_the_first_min_tokens_does_not_count_and_is_not_found_later(tokenizer: Tokenizer):
    assert ended_after(tokenizer, "xyxx", ["x", "a longer one"], min_tokens=0) == "x"
    assert ended_after(tokenizer, "xyxx", ["x", "a longer one"], min_tokens=2) == "xyx"
    assert ended_after(tokenizer, "xyyy", ["x", "a longer one"], min_tokens=1) is None


def test_texts_need_a_tokenizer():
    assert StopTexts.of(Sampling(), ALL_TOKENS) is None
    with pytest.raises(ValueError, match=r"stop = \['x'\]: the model's folder has no tokenizer.json"):
        StopTexts.of(Sampling(stop=("x",)), ALL_TOKENS)
