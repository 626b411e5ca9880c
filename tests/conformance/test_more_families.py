"""The encoder and decoder families that the default suite leaves out keep the same claims."""

import pytest
from helpers import checks
from helpers.families import OTHER_LANGUAGE, OTHER_VISION


@pytest.fixture(scope="module", params=OTHER_LANGUAGE)
def decoder(request):
    return checks.join(language=request.param)


@pytest.fixture(scope="module", params=OTHER_VISION)
def encoder(request):
    return checks.join(vision=request.param)


@pytest.mark.parametrize("check", checks.DECODER_CHECKS)
def test_every_decoder_family(decoder, check):
    check(decoder)


@pytest.mark.parametrize("check", checks.ENCODER_CHECKS)
def test_every_encoder_family(encoder, check):
    check(encoder)
