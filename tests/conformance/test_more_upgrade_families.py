"""The families that the default suite leaves out keep the same claims."""

import pytest
from helpers import bases
from helpers.image_processors import IMAGE_PROCESSORS
from helpers.upgrade_checks import FAMILY_CHECKS, check_fine_views, check_real_images, check_videos


@pytest.mark.parametrize("name", bases.OTHER_FAMILIES)
@pytest.mark.parametrize("check", FAMILY_CHECKS.values(), ids=FAMILY_CHECKS)
def test_a_family_keeps_every_claim(check, name):
    check(name)


@pytest.mark.parametrize("name", bases.VIDEO_FAMILIES)
def test_videos_are_refused_before_the_base_runs(name):
    check_videos(name)


@pytest.mark.parametrize("name", sorted({*IMAGE_PROCESSORS} - {*bases.DEFAULT_FAMILIES}))
def test_patch_tables_hold_for_images_of_awkward_sizes(name):
    check_real_images(name)


@pytest.mark.parametrize("name", ["vipllava", "paligemma", "gemma3", "deepseek_vl", "janus"])
def test_a_token_reads_the_fine_view_over_its_place(name):
    check_fine_views(name)
