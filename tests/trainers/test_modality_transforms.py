"""Transforms that take a CT towards other modalities, each against a computation of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from nnunet_flare.inference.normalisation import of_any_modality, of_signal
from nnunet_flare.phantom import make_phantom
from nnunet_flare.trainers.seeding import seed_everything
from nnunet_flare.trainers.transforms import bias_field, histogram, random_convolution
from nnunet_flare.trainers.transforms.background import DARKEST_SHARE, background_edge
from nnunet_flare.trainers.transforms.bias_field import BiasFieldTransform
from nnunet_flare.trainers.transforms.histogram import HistogramMatchTransform, landmarks
from nnunet_flare.trainers.transforms.invert import InvertTissueTransform
from nnunet_flare.trainers.transforms.own_scale import OwnScaleTransform
from nnunet_flare.trainers.transforms.random_convolution import RandomConvolutionTransform

SHAPE = (7, 9, 8)


def patch(seed: int = 0, channels: int = 1) -> torch.Tensor:
    """Values from -2 to 3, a third of them background at -2."""
    stream = np.random.default_rng(seed)
    values = stream.uniform(-1.8, 3, (channels, *SHAPE))
    values[stream.random(values.shape) < 1 / 3] = -2
    return torch.from_numpy(values.astype(np.float32))


def test_inversion_reflects_tissue_and_leaves_the_background_dark() -> None:
    image = patch(channels=2)
    done = InvertTissueTransform()(image=image.clone())["image"]
    for before, after in zip(image.numpy(), done.numpy(), strict=True):
        low, high = before.min(), before.max()
        edge = low + DARKEST_SHARE * (before[before > before.mean()].mean() - low)
        expected = before.copy()
        for place in np.argwhere(before > edge):
            expected[tuple(place)] = edge + high - before[tuple(place)]
        np.testing.assert_allclose(after, expected, atol=1e-5)
        assert (after[before == low] == low).all() and after.max() <= high + 1e-5
        tissue = before > edge
        assert np.corrcoef(before[tissue], after[tissue])[0, 1] == pytest.approx(-1, abs=1e-5)


def preprocessed(seed: int, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """A phantom as preprocessing normalises it by intensities of organs with gas in them, and its labels."""
    scan, labels = make_phantom(seed, domain=domain)
    intensities = {"mean": 90.0, "std": 105.0, "percentile_00_5": -900.0, "percentile_99_5": 200.0}
    return of_any_modality(scan.array.astype(np.float32), None, intensities), labels


@pytest.mark.parametrize("domain", ["narrow", "mr", "pet"])
def test_the_background_of_every_modality_is_found_and_no_organ_is_taken_for_it(domain: str) -> None:
    for seed in range(3):
        scan, labels = preprocessed(seed, domain)
        background = scan <= background_edge(torch.from_numpy(scan))[1]
        assert background[:, :3, :3].mean() > 0.95, "a corner of the picture, with its noise"
        assert background[labels > 0].mean() < 0.05, "vessels of a T1-weighted MR are as dark"


def test_a_ct_in_another_contrast_has_the_scale_of_a_preprocessed_mr_or_pet() -> None:
    """Organs lie and differ as those of MR and PET do, and air as far below them, up to a factor of two."""
    others = [preprocessed(seed, domain) for domain in ("mr", "pet") for seed in range(3)]
    airs = [float(np.median(scan[:, :3, :3])) for scan, _ in others]
    means = [float(scan[labels > 0].mean()) for scan, labels in others]
    spreads = [float(scan[labels > 0].std()) for scan, labels in others]
    ct, labels = preprocessed(0, "narrow")
    seed_everything(2)
    for contrast in (InvertTissueTransform(), *[RandomConvolutionTransform()] * 16):
        done = contrast(image=torch.from_numpy(ct.copy())[None])["image"]
        made = OwnScaleTransform()(image=done)["image"][0].numpy()
        assert min(means) - 0.5 < made[labels > 0].mean() < max(means) + 0.5
        assert min(spreads) / 3 < made[labels > 0].std() < 1.5 * max(spreads)
        assert made.min() == np.median(made[:, :3, :3]), "the air is darkest"
        assert 2 * min(airs) < made.min() < max(airs) / 2


def test_a_sample_is_standardised_as_preprocessing_does_it_channel_by_channel() -> None:
    image = patch(6, channels=2) * torch.tensor([1.0, 40.0]).reshape(2, 1, 1, 1)
    done = OwnScaleTransform()(image=image.clone())["image"].numpy()
    for before, after in zip(image.numpy(), done, strict=True):
        np.testing.assert_allclose(after, of_signal(before.copy()), atol=1e-6)


def test_a_bias_field_is_a_polynomial_in_the_exponent() -> None:
    assert len(bias_field.exponents(3)) == 19 and (0, 0, 0) not in bias_field.exponents(3)
    seed_everything(3)
    transform = BiasFieldTransform()
    image = patch(channels=2)
    coefficients = transform.get_parameters(image=image)["coefficients"]
    done = transform.apply({"image": image.clone()}, coefficients=coefficients)["image"].numpy()
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in SHAPE), indexing="ij")
    field = sum(
        float(c) * z**i * y**j * x**k for (i, j, k), c in zip(bias_field.exponents(3), coefficients, strict=True)
    )
    lowest = image.numpy().min(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(done, (image.numpy() - lowest) * np.exp(field) + lowest, rtol=1e-4, atol=1e-4)


def test_bias_fields_are_drawn_symmetrically_up_to_the_largest_coefficient() -> None:
    drawn = torch.cat([BiasFieldTransform(0.3).get_parameters(image=patch())["coefficients"] for _ in range(60)])
    assert -0.3 <= drawn.min() < -0.28 and 0.28 < drawn.max() <= 0.3 and abs(float(drawn.mean())) < 0.02
    assert len(bias_field.exponents(2)) == 9, "planes of a 2-d plan"


def test_matching_gives_tissue_the_distribution_of_the_reference() -> None:
    """Against sorting: the k-th of n values becomes the value of the same rank in the reference's tissue."""
    ct, mr = (torch.from_numpy(make_phantom(1, domain=d)[0].array.astype(np.float32)) for d in ("wide", "mr"))
    ct, mr = ct.clamp_min(-275) / 100, mr / 300
    done = HistogramMatchTransform([landmarks(mr)[None]])(image=ct[None].clone())["image"][0]
    edges = [background_edge(volume)[1] for volume in (ct, mr)]
    tissue, reference = (volume.numpy() > edge for volume, edge in zip((ct, mr), edges, strict=True))
    before, after, there = ct.numpy()[tissue], done.numpy()[tissue], np.sort(mr.numpy()[reference])
    dark = np.interp(ct.numpy()[~tissue], [float(ct.min()), before.min()], [float(mr.min()), there[0]])
    np.testing.assert_allclose(done.numpy()[~tissue], dark, atol=1e-4)
    assert (done.numpy()[ct.numpy() == float(ct.min())] == float(mr.min())).all()
    ranks = (np.argsort(np.argsort(before)) + 0.5) / before.size
    expected = np.interp(ranks, (np.arange(there.size) + 0.5) / there.size, there)
    assert np.quantile(np.abs(after - expected), 0.98) < 0.05 * np.ptp(there)
    order = np.argsort(before)
    assert (np.diff(after[order]) >= -1e-5).all(), "monotone"


def test_a_reference_is_drawn_anew_and_a_scan_matched_to_itself_stays() -> None:
    image = patch(4)
    same = HistogramMatchTransform([landmarks(image[0])[None]])(image=image.clone())["image"]
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)
    two = HistogramMatchTransform([landmarks(patch(seed)[0])[None] + seed for seed in (5, 9)])
    assert len({float(two(image=image.clone())["image"].min()) for _ in range(20)}) == 2
    flat = torch.full((1, *SHAPE), 2.0)
    assert torch.isfinite(histogram.landmarks(flat[0])).all()
    assert torch.isfinite(two(image=flat)["image"]).all()


@pytest.mark.parametrize("edge", [1, 3])
def test_random_convolutions_are_convolutions(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer with SciPy's correlation."""
    monkeypatch.setattr(random_convolution, "KERNELS", (edge,))
    seed_everything(7)
    transform, image = RandomConvolutionTransform(), patch(2, channels=2)
    drawn = transform.get_parameters(image=image)
    done = transform.apply({"image": image.clone()}, **drawn)["image"].numpy()
    for before, after, layers, share in zip(image.numpy(), done, drawn["layers"], drawn["shares"].numpy(), strict=True):
        values = [before.astype(float)]
        for number, (weight, bias) in enumerate(layers):
            assert weight.shape[2:] == (edge,) * 3
            if number:
                values = [np.where(v > 0, v, 0.01 * v) for v in values]
            values = [
                sum(correlate(v, kernel, mode="constant") for v, kernel in zip(values, row, strict=True)) + shift
                for row, shift in zip(weight.numpy().astype(float), bias.numpy(), strict=True)
            ]
        mixed = share * values[0] + (1 - share) * before
        tissue = before > background_edge(torch.from_numpy(before))[1]
        darkest = np.quantile(mixed[tissue], 0.01)
        mixed = np.where(tissue, np.maximum(mixed, darkest), darkest)
        expected = mixed * np.linalg.norm(before) / np.linalg.norm(mixed)
        np.testing.assert_allclose(after, expected, rtol=2e-3, atol=2e-3)
        assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before), rel=1e-3)


def test_random_convolutions_have_four_layers_of_both_kernels_and_take_planes() -> None:
    seed_everything(0)
    drawn = [layers for _ in range(20) for layers in [random_convolution.random_layers(3)]]
    assert {len(layers) for layers in drawn} == {4}
    assert {weight.shape[-1] for layers in drawn for weight, _ in layers} == {1, 3}
    plane = torch.randn(1, 12, 10)
    done = RandomConvolutionTransform()(image=plane.clone())["image"]
    assert done.shape == plane.shape and not torch.equal(done, plane)
