"""Trainer: its steps with several backends, processes and settings."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainings import FULL, configuration, gradients, photographs
from ttsr_fast.model import TTSR, save_model
from ttsr_fast.training.data import DistributedBatchSampler, EpochSampler
from ttsr_fast.training.monitor import psnr
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
    """50 steps from one seed."""
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


def test_a_step_equals_plain_code(config):
    """Adam with two rates, k steps of the discriminator, the average."""
    settings = config(*FULL, "lr_rate_lte=1e-4", "gan_k=2")
    trainer, plain = Trainer(settings), Trainer(settings)
    batch = next(trainer.batches())
    losses = trainer.step(batch, full=True)

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
        trainer.step(batch, full=True)
        now = torch.nn.utils.parameters_to_vector(trainer.networks.ttsr.parameters())
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    found = torch.nn.utils.parameters_to_vector(trainer.networks.best.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_phases_and_rates_follow_the_recipe(config):
    """Losses of every epoch, and StepLR's rates of both optimisers."""
    losses, rates = {}, {}
    settings = config("adv_w=1e-3", "size=32", "num_init_epochs=1", "num_epochs=3", "decay=2")
    settings.data.crops_per_photo = 1
    trainer = Trainer(settings, lambda state: follow(state) if state.done else None)

    def follow(state):
        losses[state.epoch] = sorted(state.losses)
        rates[state.epoch] = list(trainer.networks.rates().values())

    trainer.run()
    everything = ["adv", "discriminator", "rec", "total"]
    assert losses == {0: ["rec", "total"], 1: everything, 2: everything, 3: everything}
    first = [1e-3, 1e-4, 1e-4]
    assert rates == {0: first, 1: first, 2: first, 3: pytest.approx([x / 2 for x in first])}


def test_a_frozen_extractor_stays_as_it_is(config):
    trainer = Trainer(config("lr_rate_lte=0"))
    before = {name: x.clone() for name, x in trainer.networks.ttsr.named_parameters()}
    trainer.step(next(trainer.batches()), full=True)
    changed = {
        name.partition(".")[0]
        for name, x in trainer.networks.ttsr.named_parameters()
        if not torch.equal(x, before[name])
    }
    assert changed == {"MainNet"}


@each("switch", ["hard_attention", "soft_attention", "csfi"])
def test_ablations_train(config, switch):
    trainer = Trainer(config(f"{switch}=no"))
    batch = next(trainer.batches())
    first = trainer.step(batch, full=True)["rec"]
    for _ in range(5):
        last = trainer.step(batch, full=True)["rec"]
    assert last < first


def test_gradients_are_clipped_on_request(config):
    """Norm over all gradients. Adam normalises the step, so the gradients are compared."""
    norms = []
    for clip in ("clip=null", "clip=1e-3"):
        found, _ = gradients(config(clip))
        norms.append(torch.stack([x.norm() for x in found.values()]).norm().item())
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_sixteen_bits_change_no_match(config):
    """Textures are bit-equal to float32, and the image is close."""
    outputs = []
    for amp in ("null", "bf16"):
        AcceleratorState._reset_state(True)  # it keeps the precision of the process
        trainer = Trainer(config(f"amp={amp}", "tpl_w=1e-2"))
        batch = next(trainer.batches())
        images = {name: batch[name] for name in ("lr", "lrsr", "ref", "refsr")}
        outputs.append(trainer.networks.generator(**images))
        outputs[-1] += (torch.tensor(trainer.step(batch, full=True)["total"]),)
    AcceleratorState._reset_state(True)
    (sr, *textures, loss), (sr16, *textures16, loss16) = outputs
    assert all(torch.equal(x, y) for x, y in zip(textures, textures16, strict=True))
    torch.testing.assert_close(sr16, sr, rtol=0, atol=0.02)
    torch.testing.assert_close(loss16, loss, rtol=0.02, atol=0)
    assert sr16.dtype == torch.float32 and not torch.equal(sr16, sr)


def test_float16_is_refused_on_the_cpu(config):
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="run.amp fp16 is not possible on cpu"):
        Trainer(config("amp=fp16"))
    AcceleratorState._reset_state(True)


def test_padding_is_masked_on_request(config):
    """Keys outside the batch's mask are not matched."""
    losses = []
    for mask in ("mask_padding=no", "mask_padding=yes"):
        trainer = Trainer(config(mask))
        batch = next(trainer.batches())
        batch["key_mask"][..., 1:] = False
        losses.append(trainer.step(batch, full=True)["rec"])
    assert losses[0] != losses[1]


def test_training_starts_from_given_weights(config, tmp_path):
    torch.manual_seed(5)
    model = TTSR((1, 1, 1, 1), 4)
    save_model(model, tmp_path / "given.safetensors")
    given = f"weights={tmp_path / 'given.safetensors'}"
    found = Trainer(config(given)).networks.ttsr.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="are of another model than .* model.n_feats 8"):
        Trainer(config(given, "n_feats=8"))


def test_the_log(config, data, tmp_path):
    """Scalars of the steps and the validation, and an image of one row."""
    state = train(
        config("print_every=1", "num_epochs=1", f"validation={data}", "crops_per_photo=2")
    )
    record = EventAccumulator(str(tmp_path / "out" / "logs"))
    record.Reload()
    for name, value in state.losses.items():
        scalars = record.Scalars(f"loss/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2]
        assert scalars[-1].value == pytest.approx(value)
    assert record.Scalars("rate/MainNet")[-1].value == pytest.approx(1e-3)
    assert record.Scalars("rate/LTE")[-1].value == pytest.approx(1e-4)
    assert record.Scalars("psnr/psnr")[-1].value == pytest.approx(state.validation.psnr)
    assert record.Scalars("psnr/bicubic")[-1].value == pytest.approx(state.validation.bicubic)
    assert "speed/images" in record.Tags()["scalars"]
    (image,) = record.Images(record.Tags()["images"][0])
    assert (image.height, image.width) == (16, 4 * (16 + 4))


def test_validation_is_the_psnr_in_8_bits(config, data):
    trainer = Trainer(config(f"validation={data}"))
    items = [trainer.validation_items[number] for number in range(len(trainer.validation_items))]
    expected = []
    for item in items:
        x, y = (((item[name] + 1) * 127.5).round().double() for name in ("lrsr", "hr"))
        expected.append(10 * torch.log10(255**2 / (x - y).square().mean()).item())
    trainer.run()
    assert trainer.state.validation.bicubic == pytest.approx(sum(expected) / len(items), rel=1e-5)
    assert psnr(items[0]["hr"], items[0]["hr"]) == float("inf")
    assert math.isnan(psnr(torch.full_like(items[0]["hr"], torch.nan), items[0]["hr"]))


def test_processes_divide_every_batch():
    """Together they have the indices of one process, the same number in each."""
    sampler = EpochSampler(11, seed=3, epoch=2)
    whole = list(DistributedBatchSampler(sampler, 4, 0, 0, 1))
    parts = [list(DistributedBatchSampler(sampler, 4, 0, rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    assert [len(batch) for batch in whole] == [4, 4]
    assert list(DistributedBatchSampler(sampler, 4, 1, 0, 1)) == whole[1:]
