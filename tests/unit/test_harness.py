"""The log-likelihoods of lm-eval, a harness for many models, are those of the model itself, however long the text."""

import pytest
import torch
from support.models import confident_model

from armt_dist.data.tokenizers import byte_tokenizer

PLAY = "Where be your gibes now? Your gambols, your songs? "


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """An exported model as the harness loads it: from its folder, with the code that it carries."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("model")
    confident_model(259, 32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return HFLM(str(folder), trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")


def direct(model, ids):
    """Log-likelihood of every token but the first, summed in float64."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[1:, None]).sum().item()


@pytest.mark.slow
def test_log_likelihoods_equal_the_direct_ones(harness):
    from lm_eval.api.instance import Instance

    texts = [(PLAY * 500)[:tokens] for tokens in (100, 2_000, 5_000, 20_000)]
    # Not behind a space, which the harness would move into the continuation.
    cut = 58
    requests = [Instance("loglikelihood", {}, (text[:cut], text[cut:]), 0) for text in texts]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for text, (log_likelihood, _) in zip(texts, found, strict=True):
        ids = torch.tensor(harness.tokenizer(text)["input_ids"])
        assert len(ids) == len(text), "bytes are not tokens"
        expected = direct(harness.model, ids) - direct(harness.model, ids[:cut])
        assert log_likelihood == pytest.approx(expected, rel=1e-5), f"{len(text)} tokens"
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    rolling = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, log_likelihood in zip(texts, rolling, strict=True):
        ids = torch.tensor([harness.prefix_token_id, *harness.tokenizer(text)["input_ids"]])
        assert log_likelihood == pytest.approx(direct(harness.model, ids), rel=1e-5), f"{len(text)} tokens"
