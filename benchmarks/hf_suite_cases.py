"""What transformers' own tests need to know of our classes: tiny settings of each, and the same of
the stock LLaVA.

Run by benchmarks/hf_suite.py, which puts transformers' `tests` folder on the path; not collected by
our own suite. Models are random, tokenizers and images are made on the spot, and nothing is
fetched.
"""

import random
import unittest

import pytest
from tests.pipelines import test_pipelines_image_text_to_text as pipeline_tests
from tests.test_modeling_common import floats_tensor
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tests.vlm_tester import VLMModelTest, VLMModelTester
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparsecut.configuration import SparseCutConfig, SparseCutUpgradeConfig
from sparsecut.modeling import SparseCutForConditionalGeneration
from sparsecut.modeling_upgraded import SparseCutUpgrade
from sparsecut.plan import Plan, Shortcut
from sparsecut.processing import SparseCutProcessor

# The tests look here for the names of the classes that take labels; registering with the Auto
# classes does not reach it.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["sparsecut"] = "SparseCutForConditionalGeneration"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["sparsecut_upgrade"] = "SparseCutUpgrade"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% if message['content'] is"
    " string %}{{ message['content'] + ' ' }}{% else %}{% for item in message['content'] %}{% if"
    " item['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}{% for item in"
    " message['content'] %}{% if item['type'] == 'text' %}{% if message['role'] == 'assistant' %}{%"
    " generation %}{{ item['text'] + ' ' }}{% endgeneration %}{% else %}{{ item['text'] + ' ' }}{%"
    " endif %}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{"
    " 'ASSISTANT:' }}{% endif %}"
)

# The stock tests of LLaVA expect this failure too: a checkpoint's last block or norm is not always
# read.
UNREAD = pytest.mark.xfail(reason="the encoder's last layers are not read, so they get no gradient")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that has a token for every byte, three special ones and the placeholder: 260 in
    all.
    """
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE({word: i for i, word in enumerate([*special.values(), *alphabet])}, [])
    )
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return tokenizer


class LlavaTester(VLMModelTester):
    base_model_class = LlavaForConditionalGeneration
    config_class, text_config_class, vision_config_class = (
        LlavaConfig,
        LlamaConfig,
        CLIPVisionConfig,
    )
    conditional_generation_class = None
    image_settings = {
        "patch_size": 4,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }

    def __init__(self, parent, **settings):
        # The training test reads 1 to 19 without images, and one about resizing cuts 15 words off
        # the vocabulary.
        super().__init__(parent, vocab_size=99, image_token_id=30, **settings)

    def _check_required_attributes(self):
        """Both classes are tested alone, without a model class for the part below the head."""

    def processor(self):
        """A processor for the tester's models, with a vocabulary of bytes."""
        size = {"height": self.image_size, "width": self.image_size}
        images = CLIPImageProcessorPil(size=size, crop_size=size)
        return LlavaProcessor(
            images, byte_tokenizer(), chat_template=TEMPLATE, **self.image_settings
        )


class SparseCutTester(LlavaTester):
    base_model_class = SparseCutForConditionalGeneration
    config_class = SparseCutConfig

    def create_pixel_values(self):
        """Images of as many views as the plan has."""
        views = self.get_config().get_plan().num_views
        return floats_tensor(
            [self.batch_size, views, self.num_channels, self.image_size, self.image_size]
        )

    image_settings = {"image_size": 8, "tiles": 2, "num_image_tokens": 4}

    def processor(self):
        """A processor for the tester's models, with a vocabulary of bytes."""
        settings = {"chat_template": TEMPLATE} | self.image_settings
        return SparseCutProcessor(CLIPImageProcessorPil(), byte_tokenizer(), **settings)


class UpgradeTester(LlavaTester):
    base_model_class = SparseCutUpgrade
    plan = Plan((Shortcut((), 0, "base"), Shortcut((0, 1), 1, "channels")), gate="zero_projector")

    def get_config(self):
        """The configuration of a tiny LLaVA under a plan."""
        return SparseCutUpgradeConfig(base_config=super().get_config(), plan=self.plan.to_dict())


class ModelCases(VLMModelTest, TrainingTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # no source file of ours tells its year

    @UNREAD
    def test_training_gradient_checkpointing(self):
        """Every parameter is expected to have a gradient."""
        super().test_training_gradient_checkpointing()

    @UNREAD
    def test_training_gradient_checkpointing_use_reentrant_false(self):
        """Every parameter is expected to have a gradient."""
        super().test_training_gradient_checkpointing_use_reentrant_false()

    @UNREAD
    def test_training_gradient_checkpointing_use_reentrant_true(self):
        """Every parameter is expected to have a gradient."""
        super().test_training_gradient_checkpointing_use_reentrant_true()

    @property
    def pipeline_model_mapping(self):
        """No task: the tests of a task fetch models by name, so the one that concerns us is run
        below.
        """
        return {}

    @pipeline_model_mapping.setter
    def pipeline_model_mapping(self, mapping):
        """What a test's `setUp` sets is not used."""

    def test_training_overfit(self):
        """As it stands, on texts alone; it looks for the size of the vocabulary in a configuration
        that is not composite.
        """
        settings = self.model_tester.get_config()
        object.__setattr__(settings, "vocab_size", self.model_tester.vocab_size)
        self.model_tester.get_config = lambda: settings
        super().test_training_overfit()

    def run_task_tests(self, task, dtype="float32"):
        """The tests of the task `image-text-to-text`, with a model made here."""
        if task != "image-text-to-text":
            self.skipTest(f"{task} is no task of these models")
        processor = self.model_tester.processor()
        self.model_tester.vocab_size = len(processor.tokenizer)
        self.model_tester.image_token_id = processor.image_token_id
        model = self.model_tester.base_model_class(self.model_tester.get_config()).eval()
        tests = pipeline_tests.ImageTextToTextPipelineTests()
        pipeline, examples = tests.get_test_pipeline(
            model, processor.tokenizer, processor, processor.image_processor, dtype=dtype
        )
        examples = [{**example, "text": f"<image>{example['text']}"} for example in examples]
        tests.run_pipeline_test(pipeline, examples)
        batch = (random.choice(examples) for _ in range(10))
        self.assertEqual(len(list(pipeline(batch, batch_size=4))), 10)


class TestLlava(ModelCases, unittest.TestCase):
    model_tester_class = LlavaTester


class TestSparseCut(ModelCases, unittest.TestCase):
    model_tester_class = SparseCutTester


class TestUpgrade(ModelCases, unittest.TestCase):
    model_tester_class = UpgradeTester

    @pytest.mark.xfail(
        reason=(
            "saved under the names that weights have here, not under those of old files, for"
            " Trainers to read"
        )
    )
    def test_reverse_loading_mapping(self):
        """Expects weights to be saved under other names than they have here."""
        super().test_reverse_loading_mapping()


class ProcessorCases(ProcessorTesterMixin):
    @classmethod
    def _setup_from_components(cls):
        return cls.settings_class(None).processor()

    @classmethod
    def prepare_processor_dict(cls):
        """What the processor is made with besides its parts."""
        return {"chat_template": TEMPLATE} | cls.settings_class.image_settings


class TestLlavaProcessor(ProcessorCases, unittest.TestCase):
    processor_class, settings_class = LlavaProcessor, LlavaTester


class TestSparseCutProcessor(ProcessorCases, unittest.TestCase):
    processor_class, settings_class = SparseCutProcessor, SparseCutTester

    def test_subprocessor_defaults_1_images(self):
        """Expects of the whole processor what the image processor gives alone."""
        self.skipTest("an image becomes several views, but the image processor alone makes one")
