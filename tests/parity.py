"""What agrees with the published code, written down: `pytest --parity` runs the checks and writes results/parity.json.

A check is one case of one test below; what it saw is the largest difference of all its comparisons, each
measured against what was allowed there. Ordinary runs write nothing.
"""

import json
import subprocess
from pathlib import Path

import closeness
import numpy as np
import pytest
import torch

from reidlab.core.run import commit

ROOT = Path(__file__).parents[1]
FILE = ROOT / "results" / "parity.json"
DARTS, PC, GDAS, AUTO = "DARTS", "PC-DARTS", "GDAS", "Auto-ReID"
BASE, CDNET = "re-ID baselines", "CDNet"
TRANSREID = "TransReID family"
SOLIDER = "SOLIDER"
CLIP = "CLIP-ReID"
OSNET = "torchreid"
FAST = "fast-reid"
SOURCES = {  # whose code → what was run, once, to have numbers to compare with
    DARTS: "rules, rates and gradients of the public DARTS code",
    PC: "channel shuffle and edge weights of the public PC-DARTS code",
    GDAS: "Gumbel draws of the public GDAS code, its noise given",
    AUTO: "the authors' part-aware operation and genotypes, the networks of the public re-implementation",
    BASE: "pytorch-reid-lite, reid_baseline_with_syncbn, reid-strong-baseline",
    CDNET: "the authors' solicucu/ReID",
    OSNET: "the authors' OSNets, as torchreid publishes them",
    FAST: "the authors' fast-reid: BoT R50 and R50-IBN, its photos, counts of AGW and SBS",
    TRANSREID: "the authors' TransReID, PASS and PersonViT",
    SOLIDER: "the authors' tinyvision/SOLIDER-REID",
    CLIP: "the authors' CLIP-ReID",
}
CHECKS = {  # file → test → (whose code, what is compared)
    "test_golden_autoreid": {
        "test_operation": (AUTO, "operations: outputs and running statistics"),
        "test_derived_genotype": (DARTS, "genotypes read off alphas"),
        "test_published_genotype": (AUTO, "published genotypes, edge by edge"),
        "test_supernet_counts": (AUTO, "supernets: parameters, norms, reduction cells"),
        "test_shapes_of_the_supernet": (AUTO, "supernets: shapes of every stage"),
        "test_derived_network": (AUTO, "derived networks: parameters and MACs"),
        "test_paper_style_network": (AUTO, "the paper's networks: parameters, MACs, shapes"),
        "test_cosine_rate": (DARTS, "learning rates"),
        "test_triplet": (AUTO, "triplet loss and its hardest pairs"),
        "test_triplet_of_people_with_one_photo": (AUTO, "triplet loss and its hardest pairs"),
        "test_retrieval_loss": (AUTO, "retrieval loss"),
        "test_straight_through_draw": (GDAS, "Gumbel draws and their gradients"),
        "test_channel_shuffle": (PC, "partial channels and edge weights"),
        "test_edge_shares": (PC, "partial channels and edge weights"),
        "test_hypergradient_of_a_quadratic": (DARTS, "gradients of the alphas"),
        "test_first_order_gradient_of_the_alphas": (DARTS, "gradients of the alphas"),
        "test_parts_of_the_second_order_gradient": (DARTS, "gradients of the alphas"),
        "test_second_order_gradient_of_the_alphas": (DARTS, "gradients of the alphas"),
    },
    "test_golden_baselines": {
        "test_triplet_loss_and_gradient": (BASE, "triplet losses and gradients"),
        "test_triplet_does_not_depend_on_the_order_of_the_batch": (
            BASE,
            "triplet losses and gradients",
        ),
        "test_triplet_stats": (BASE, "statistics of the mining"),
        "test_smoothed_cross_entropy": (BASE, "cross-entropy, plain and smoothed"),
        "test_soft_mined_triplet": (BASE, "soft-mined triplet losses and gradients"),
        "test_statistics_of_both_minings": (BASE, "statistics of the mining"),
        "test_focal": (BASE, "focal loss"),
        "test_centre_loss_gradients_and_step": (BASE, "centre, range and cluster losses"),
        "test_range": (BASE, "centre, range and cluster losses"),
        "test_cluster_and_its_local_form": (BASE, "centre, range and cluster losses"),
        "test_published_margin_head": (BASE, "margin heads"),
        "test_am_softmax": (BASE, "margin heads"),
        "test_standard_scores": (BASE, "mAP, AP and CMC"),
        "test_trapezoidal_scores": (BASE, "mAP, AP and CMC by trapezoids"),
        "test_queries_without_a_match_are_named": (BASE, "mAP, AP and CMC"),
        "test_cdnet_evaluation": (CDNET, "mAP and CMC"),
    },
    "test_golden_cdnet": {
        "test_parameters_of_every_head_and_number_of_classes": (CDNET, "parameters"),
        "test_parameters_module_by_module": (CDNET, "parameters"),
        "test_parameters_of_the_comparison_networks": (CDNET, "parameters"),
        "test_multiply_accumulates": (CDNET, "MACs"),
        "test_shapes": (CDNET, "shapes of every stage"),
        "test_keys_and_shapes_are_those_of_the_published_checkpoints": (
            CDNET,
            "names and shapes of the released weights",
        ),
        "test_embeddings_and_logits": (CDNET, "embeddings, logits and activations"),
        "test_a_training_step": (CDNET, "a training step: losses and gradients"),
        "test_losses": (CDNET, "a training step: losses and gradients"),
        "test_the_recipe_follows_the_published_schedule": (CDNET, "learning rates"),
        "test_the_published_lists": (CDNET, "lists of layers"),
        "test_supernets_have_the_candidates_and_the_weights": (CDNET, "supernets: candidates"),
        "test_selection": (CDNET, "top-k selection and its gradient"),
        "test_a_supernet_and_the_gradient_of_its_alphas": (CDNET, "gradients of the alphas"),
    },
    "test_golden_heads": {
        "test_stripes_in_evaluation": (BASE, "stripes of PCB"),
        "test_stripes_in_training_without_dropout": (BASE, "stripes of PCB"),
        "test_spectral_transform": (BASE, "spectral transform"),
    },
    "test_golden_osnet": {
        "test_embeddings": (OSNET, "embeddings, at two sizes"),
        "test_logits": (OSNET, "logits"),
        "test_names_and_shapes_are_those_of_a_published_file": (
            OSNET,
            "names and shapes of the released weights",
        ),
    },
    "test_golden_fastreid": {
        "test_bicubic_is_pillows_to_the_bit": (FAST, "photos resized"),
        "test_the_networks_see_what_theirs_saw": (FAST, "photos as the network sees them"),
        "test_embeddings_and_every_stage_of_the_way": (FAST, "embeddings, and every stage"),
        "test_parameters_and_multiply_accumulates": (FAST, "parameters and MACs"),
    },
    "test_golden_transreid": {
        "test_embeddings": (TRANSREID, "embeddings before and after the neck"),
        "test_position_tables_on_other_grids": (TRANSREID, "position tables, and timm's"),
    },
    "test_golden_clip": {
        "test_embeddings": (CLIP, "embeddings before and after the necks"),
        "test_inner_outputs": (CLIP, "statistics of every stage"),
        "test_every_tensor_has_a_place_and_the_costs_are_the_published_ones": (
            CLIP,
            "names, parameters and MACs",
        ),
    },
    "test_golden_solider": {
        "test_embeddings": (SOLIDER, "embeddings before and after the neck"),
        "test_every_tensor_has_a_place_and_the_costs_are_the_published_ones": (
            SOLIDER,
            "names, parameters and MACs",
        ),
    },
    "test_rerank": {
        "test_published_distances": (BASE, "k-reciprocal re-ranking"),
        "test_published_smoothing": (BASE, "smoothing of the first fifty"),
    },
}
OURS = {  # tests of those files that compare with nothing of others
    "test_kept_numbers_are_the_golden_ones",
    "test_rules_disagree",
    "test_the_network_of_the_paper_has_its_numbers",
    "test_multiply_accumulates_agree_with_the_formula",
    "test_the_published_numbers",
    "test_a_fine_tuning_start_keeps_everything_but_the_classifiers",
    "test_every_row_of_the_recipes_can_be_built",
    "test_first_weights_of_the_whole_network",
}
WHOLE = ("test_golden_autoreid", "test_golden_baselines", "test_golden_cdnet", "test_golden_heads")


def check_of(item):
    "(whose code, what is compared) of a test's case; None: it compares with nobody's."
    return CHECKS.get(item.path.stem, {}).get(getattr(item, "originalname", ""))


def measured(ours, theirs, rtol, atol):
    "(difference, what was allowed there), where they come closest; shares of the largest magnitude."
    ours, theirs = (
        torch.as_tensor(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)).double()
        for x in (ours, theirs)
    )
    if not theirs.numel():
        return 0.0, 0.0
    off, allowed = (ours - theirs).abs(), atol + rtol * theirs.abs()
    worst = int((off / allowed.clamp_min(1e-300)).flatten().argmax())
    scale = float(theirs.abs().max()) or 1.0
    return float(off.flatten()[worst]) / scale, float(
        allowed.expand_as(off).flatten()[worst]
    ) / scale


def listening(item, patch):
    "The comparisons that a test is about to make: (difference, allowed) pairs, added as it goes."
    seen = []

    def close(actual, expected, rtol=None, atol=None, **more):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, **more)
        usual = (rtol, atol) if rtol is not None else (1.3e-6, 1e-5)  # torch's, for float32
        seen.append(measured(actual, expected, *usual))

    def all_close(
        actual, desired, rtol=1e-7, atol=0, *, original=np.testing.assert_allclose, **more
    ):
        original(actual, desired, rtol=rtol, atol=atol, **more)
        seen.append(measured(actual, desired, rtol, atol))

    def same_formula(ours, theirs, terms, scale=None, *, original=closeness.assert_same_formula):
        original(ours, theirs, terms, scale)
        theirs = closeness.doubled(theirs)
        size = float(theirs.abs().max()) if scale is None else float(scale)
        off, _ = measured(closeness.doubled(ours), theirs, 0.0, 1.0)
        share = float(theirs.abs().max()) / size if size else 1.0
        seen.append((off * share, terms * closeness.ROUNDING))

    for name, spy in (("assert_close", close), ("assert_same_formula", same_formula)):
        if hasattr(item.module, name):
            patch.setattr(item.module, name, spy)
    if getattr(item.module, "close", None) is closeness.assert_same_formula:
        patch.setattr(item.module, "close", same_formula)
    patch.setattr(np.testing, "assert_allclose", all_close)
    return seen


def entry(item, seen, passed):
    "A check as the file has it."
    whose, what = check_of(item)
    worst = max(seen, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0, default=(0.0, 0.0))
    exact = not any(allowed for _, allowed in seen)
    return {
        "check": f"{item.path.name}::{item.name}",
        "system": whose,
        "source": SOURCES[whose],
        "what": what,
        "comparisons": len(seen),
        "tolerance": "exact" if exact else float(f"{worst[1]:.2e}"),
        "difference": float(f"{worst[0]:.2e}"),
        "passed": passed,
    }


class Recorder:
    "Runs beside the tests of `pytest --parity` and writes what they saw."

    def __init__(self):
        self.entries, self.items, self.seen, self.skipped = [], {}, {}, []

    def pytest_collection_modifyitems(self, config, items):
        chosen = [item for item in items if check_of(item)]
        config.hook.pytest_deselected(items=[item for item in items if not check_of(item)])
        items[:] = chosen
        self.items = {item.nodeid: item for item in chosen}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        with pytest.MonkeyPatch.context() as patch:
            self.seen[item.nodeid] = listening(item, patch)
            yield

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.skipped.append(report.nodeid)
        elif report.when == "call":
            item = self.items[report.nodeid]
            self.entries.append(entry(item, self.seen[report.nodeid], report.passed))

    def pytest_sessionfinish(self):
        if self.skipped or not self.entries:
            print(f"\n{FILE.name} not written: {len(self.skipped)} checks were skipped.")
            return
        when = commit()[0]
        made = {"commit": when, "day": day_of(when), "torch": torch.__version__}
        lines = ",\n".join(json.dumps(e) for e in sorted(self.entries, key=lambda e: e["check"]))
        FILE.write_text(
            f'{{"made": {json.dumps(made)}, "checks": [\n{lines}\n]}}\n', encoding="utf-8"
        )
        print(f"\n{FILE.relative_to(ROOT)}: {len(self.entries)} checks")


def day_of(when):
    "The day of a commit."
    words = ["git", "-C", str(ROOT), "show", "-s", "--format=%cs", when]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
