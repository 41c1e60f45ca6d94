"""The trainer: what its steps compute, by whatever search and in however many processes."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image as PILImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainings import FULL, configuration, gradients, photographs
from ttsr_fast.model import TTSR, load_model
from ttsr_fast.training import steps as steps_module
from ttsr_fast.training.steps import NotFinite
from ttsr_fast.training.trainer import Trainer, train

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


@pytest.fixture
def config(data, tmp_path):
    return lambda *settings: configuration(data, tmp_path / "out", *settings)


def losses_of(config, steps):
    found = []
    train(
        config, progress=lambda state: found.append(state.losses["total"]) if state.done else None
    )
    assert len(found) == steps
    return torch.tensor(found)


def test_the_search_gives_the_losses_of_the_oracle(data, tmp_path):
    """50 steps of one recipe from one seed."""
    settings = ("crops_per_photo=5", "num_epochs=10")
    fast = losses_of(configuration(data, tmp_path / "fast", *settings), 50)
    oracle = configuration(data, tmp_path / "oracle", "backend=reference", *settings)
    torch.testing.assert_close(fast, losses_of(oracle, 50), rtol=0, atol=1e-4)
    assert fast[-5:].mean() < 0.9 * fast[:5].mean()


@each("settings", [(), FULL, (*FULL, "gan_type=gan", "tpl_use_S=True", "tpl_type=l1")])
def test_two_processes_have_the_gradients_of_one(two, config, settings):
    settings = (*settings, "batch_size=4")
    expected, expected_losses = gradients(config(*settings))
    for found, losses in two.run(gradients, config(*settings)):
        assert found.keys() == expected.keys()
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_have_the_gradients_of_the_whole(config):
    expected, expected_losses = gradients(config(*FULL, "batch_size=4"))
    found, losses = gradients(config(*FULL, "batch_size=4", "accumulate=2"))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_is_that_of_plain_code(config):
    """The recipe written out: Adam with two rates, k steps of the discriminator, the average."""
    settings = config(*FULL, "lr_rate_lte=1e-4", "gan_k=2")
    trainer, plain = Trainer(settings), Trainer(settings)
    batch = next(trainer.batches())
    losses = trainer.steps.step(batch, full=True)

    model, critic = plain.networks.ttsr, plain.networks.discriminator
    learnt = [x for n, x in model.LTE.named_parameters() if not n.startswith("sub_mean")]
    groups = [{"params": model.MainNet.parameters()}, {"params": learnt, "lr": 1e-4}]
    adam = torch.optim.Adam(groups, lr=1e-3)
    adam_d = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    images = {name: batch[name] for name in ("lr", "lrsr", "ref", "refsr")}
    sr, S, *textures = model(**images)
    epsilon = torch.Generator().manual_seed(settings.run.seed)
    for _ in range(2):
        share = torch.rand(2, 1, 1, 1, generator=epsilon)
        mix = (share * batch["hr"] + (1 - share) * sr.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mix).sum(), mix, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss_d = critic(sr.detach()).mean() - critic(batch["hr"]).mean() + 10 * penalty
        adam_d.zero_grad()
        loss_d.backward()
        adam_d.step()
    rec = (sr - batch["hr"]).abs().mean()
    pairs = zip(model(sr=sr), textures[::-1], strict=True)
    tpl = sum((x - y).square().mean() for x, y in pairs) / 3
    total = rec + 1e-2 * tpl - 1e-3 * critic(sr).mean()
    total.backward()
    adam.step()

    assert losses["total"] == pytest.approx(total.item(), rel=1e-5)
    assert losses["discriminator"] == pytest.approx(loss_d.item(), rel=1e-5)
    networks = trainer.networks
    for ours, theirs in ((networks.ttsr, model), (networks.discriminator, critic)):
        for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)  # of steps of 1e-4


def test_the_average_follows_the_weights(config):
    trainer = Trainer(config("ema=0.9"))
    expected = None
    for batch in trainer.batches():
        trainer.steps.step(batch, full=True)
        now = torch.nn.utils.parameters_to_vector(trainer.networks.ttsr.parameters())
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    found = torch.nn.utils.parameters_to_vector(trainer.networks.best.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
