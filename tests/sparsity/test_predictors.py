"""Both predictors: sizes, independence of padding, of other images and of other tokens, and the recordings."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava.costs import LLAVA_7B, LLAVA_13B, predictor_flops
from dynamic_llava.sparsity import ImagePredictor, OutputPredictor, keep_margin


@pytest.fixture
def image_predictor():
    return ImagePredictor(24, width=16, heads=4, mlp=32, blocks=2)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("hidden", "image", "output"), [(4096, 8.57, 2.27), (5120, 9.10, 2.80)])
def test_sizes_at_full_scale(hidden, image, output):
    with torch.device("meta"):
        assert round(count(ImagePredictor(hidden)) / 1e6, 2) == image
        assert round(count(OutputPredictor(hidden)) / 1e6, 2) == output
        assert ImagePredictor(hidden)(torch.empty(2, 576, hidden)).shape == (2, 576, 2)
        assert OutputPredictor(hidden)(torch.empty(2, 9, hidden)).shape == (2, 9, 2)


@pytest.mark.parametrize("shape", [LLAVA_7B, LLAVA_13B], ids=["7B", "13B"])
def test_flops_formula_counts_the_modules(shape):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        ImagePredictor(shape.hidden)(torch.empty(3, 576, shape.hidden))
        OutputPredictor(shape.hidden)(torch.empty(1, 50, shape.hidden))
    assert counter.get_total_flops() == predictor_flops(shape.hidden, 576, 50, images=3)


def test_padding_has_no_influence_on_an_image(image_predictor):
    hidden = torch.randn(3, 10, 24)
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1, 7:] = False
    valid[2, ::2] = False
    expected = [image_predictor(hidden[i : i + 1, valid[i]])[0] for i in range(3)]
    for garbage in (0.0, 1e4, float("inf"), float("nan")):
        logits = image_predictor(hidden.masked_fill(~valid[..., None], garbage), valid)
        assert torch.isfinite(logits).all()
        for i in range(3):
            torch.testing.assert_close(logits[i, valid[i]], expected[i], rtol=1e-5, atol=1e-6)


def test_padding_gets_no_gradient(image_predictor):
    hidden = torch.randn(2, 6, 24, requires_grad=True)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    image_predictor(hidden, valid)[valid].square().sum().backward()
    assert hidden.grad[1, 4:].abs().max() == 0 and hidden.grad[1, :4].abs().min() > 0


def test_an_image_slot_without_tokens_stays_finite(image_predictor):
    hidden = torch.randn(2, 6, 24, requires_grad=True)
    valid = torch.tensor([[True] * 6, [False] * 6])
    logits = image_predictor(hidden, valid)
    torch.testing.assert_close(logits[0], image_predictor(hidden[:1])[0], rtol=1e-5, atol=1e-6)
    logits.sum().backward()
    gradients = [hidden.grad, *(parameter.grad for parameter in image_predictor.parameters())]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_images_do_not_see_each_other_and_tokens_have_no_order(image_predictor):
    hidden = torch.randn(4, 9, 24)
    logits = image_predictor(hidden)
    torch.testing.assert_close(image_predictor(hidden[2:3])[0], logits[2], rtol=1e-5, atol=1e-6)
    order = torch.randperm(9)
    torch.testing.assert_close(image_predictor(hidden[:, order]), logits[:, order], rtol=1e-5, atol=1e-6)


def test_an_image_token_sees_the_others_of_its_image(image_predictor):
    hidden = torch.randn(1, 5, 24, requires_grad=True)
    image_predictor(hidden)[0, 0].sum().backward()
    assert (hidden.grad[0].abs().amax(-1) > 0).all()


def test_output_predictor_sees_one_token_at_a_time():
    predictor = OutputPredictor(24, width=16)
    hidden = torch.randn(3, 7, 24)
    logits = predictor(hidden)
    for row in range(3):
        for token in range(7):
            torch.testing.assert_close(predictor(hidden[row, token]), logits[row, token], rtol=1e-5, atol=1e-6)


def test_keep_margin_is_keep_minus_drop_in_float32():
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    assert keep_margin(logits).tolist() == [2.0, -3.0]
    assert keep_margin(logits.bfloat16()).dtype == torch.float32
    assert keep_margin(logits.double()).dtype == torch.float64


def official_weights(part):
    """The recorded weights of one predictor under this library's names, keep channel last."""
    from tests.golden_model import our_name, our_value, recording

    prefix = f"model.{part}_score_predictor."
    weights = {name: tensor for name, tensor in recording("model").items() if name.startswith(prefix)}
    ours = {our_name(name): our_value(name, tensor) for name, tensor in weights.items()}
    return {name.split("_predictor.", 1)[1]: tensor for name, tensor in ours.items()}


def test_golden_image_predictor():
    from tests.golden_model import recording

    predictor = ImagePredictor(64, width=32, heads=4, mlp=64, blocks=2)
    predictor.load_state_dict(official_weights("image"), strict=True)
    recorded, training = recording("predictors"), recording("training")
    logits = predictor(recorded["image.in"])
    torch.testing.assert_close(logits, recorded["image.logits"].flip(-1), rtol=0, atol=2e-5)
    keep_logprob = torch.log_softmax(logits, dim=-1)[..., 1]
    torch.testing.assert_close(keep_logprob, recorded["image.keep_logprob"], rtol=0, atol=2e-5)
    # The image of every training prompt stands at places 4 to 19.
    logits = predictor(training["hidden_before_sparse_layer"][:, 4:20])
    torch.testing.assert_close(logits, training["tau1.0.image_logits"].flip(-1), rtol=0, atol=2e-5)


def test_golden_output_predictor():
    from tests.golden_model import recording

    predictor = OutputPredictor(64, width=32)
    predictor.load_state_dict(official_weights("output_text"), strict=True)
    recorded, training = recording("predictors"), recording("training")
    logits = predictor(recorded["text.in"])
    torch.testing.assert_close(logits, recorded["text.logits"].flip(-1), rtol=0, atol=2e-5)
    hidden, labels = training["hidden_before_sparse_layer"], training["expanded_labels"]
    for row in range(3):
        answer = labels[row] != -100
        logits = predictor(hidden[row, answer])
        expected = training["tau1.0.text_logits"][row, : len(logits)].flip(-1)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_refuses_unfit_sizes_and_inputs(image_predictor):
    with pytest.raises(ValueError, match="divides it"):
        ImagePredictor(24, width=16, heads=5)
    for width in (0, 6):
        with pytest.raises(ValueError, match="multiple of 4"):
            OutputPredictor(24, width=width)
    with pytest.raises(ValueError, match="images, tokens, hidden size"):
        image_predictor(torch.randn(10, 24))
    with pytest.raises(ValueError, match="valid is"):
        image_predictor(torch.randn(2, 10, 24), torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid is"):
        image_predictor(torch.randn(2, 10, 24), torch.ones(2, 10))
