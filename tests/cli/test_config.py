"""Configuration: every key documented, layers in order, mistakes named."""

import pytest
import yaml

from src.cli.config import (
    RECIPES,
    Affects,
    Config,
    default_values,
    default_yaml,
    key_info,
    keys_affecting,
)
from src.cli.flags import flags_without_effect, misplaced_flags, parse_flags
from src.cli.recipes import load_config, read_recipe
from src.utils.errors import UserError


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipe_is_valid_by_name_and_by_path(recipe):
    assert load_config({"config_path": recipe}) == load_config(
        {"config_path": str(RECIPES / f"{recipe}.yaml")}
    )


# The hyper-parameters of the seeds' read-me files and of the paper's code (acnet/do_acnet.py).
@pytest.mark.parametrize(
    "recipe,expected",
    [
        (
            "alexnet_imagenet",
            {
                "network": "alexnet",
                "lr": 0.13,
                "per_batch_size": 256,
                "max_epoch": 150,
                "warmup_epochs": 5,
                "weight_decay": 1e-4,
                "smoothing": 0.1,
                "lr_scheduler": "cosine_annealing",
                "momentum": 0.9,
            },
        ),
        (
            "resnext50_imagenet",
            {
                "network": "resnext50_32x4d",
                "lr": 0.4,
                "per_batch_size": 128,
                "max_epoch": 150,
                "warmup_epochs": 1,
                "color_jitter": (0.4, 0.4, 0.4),
            },
        ),
        (
            "acnet_resnet18_imagenet",
            {
                "network": "resnet18",
                "block": "acb",
                "lr": 0.1,
                "global_batch_size": 256,
                "max_epoch": 100,
                "weight_decay": 1e-4,
                "gamma_init": 1,
                "color_jitter": (0, 0, 0),
            },
        ),
        (
            "acnet_cifar_quick_cifar10",
            {"lr": 0.1, "global_batch_size": 128, "max_epoch": 150, "gamma_init": 0.333},
        ),
        ("acnet_resnet56_cifar_cifar10", {"lr": 0.2, "max_epoch": 400}),
        ("acnet_wrn16_8_cifar_cifar10", {"lr": 0.1, "weight_decay": 5e-4}),
    ],
)
def test_recipes_are_those_of_the_seeds(recipe, expected):
    config = load_config({"config_path": recipe})
    assert {key: getattr(config, key) for key in expected} == expected


def test_flags_win_over_recipes_and_aliases_work():
    flags, positional = parse_flags(
        [
            "--data_dir=/d",
            "--is_distributed=1",
            "-a",
            "resnet34",
            "-b",
            "acb",
            "--pretrained",
            "x.ckpt",
            "--lr-epochs=3,6",
            "--run_eval",
            "photo.jpg",
        ][:-1]
        + ["--lr", "0.3"]
    )
    config = load_config({**flags, "config_path": "alexnet_imagenet"})
    assert (config.data_path, config.run_distribute, config.network, config.block) == (
        "/d",
        True,
        "resnet34",
        "acb",
    )
    assert (config.checkpoint_file_path, config.lr_epochs, config.run_eval, config.lr) == (
        "x.ckpt",
        [3, 6],
        True,
        0.3,
    )
    assert config.max_epoch == 150 and positional == []


def test_a_flag_without_its_value_is_named_but_for_switches():
    assert parse_flags(["--run_eval", "--resume", "--test-flip"])[0] == {
        "run_eval": "true",
        "resume": "auto",
        "test_flip": "true",
    }
    for words, key in (
        (["--max_epoch"], "max_epoch"),
        (["-a"], "network"),
        (["--data_dir", "--lr=0.1"], "data_path"),
    ):
        with pytest.raises(UserError, match=f"^{words[0]} needs a value, as in --{key}=VALUE"):
            parse_flags(words)


def test_a_batch_per_rank_that_is_typed_wins_over_a_recipes_global_batch():
    config = load_config({"config_path": "digits", "per_batch_size": "4"})
    assert (config.per_batch_size, config.global_batch_size) == (4, 0)
    both = load_config({"config_path": "digits", "per_batch_size": "4", "global_batch_size": "16"})
    assert both.global_batch_size == 16


def test_acnet_short_names_bring_their_recipes():
    assert load_config({"network": "cfqkbnc"}).max_epoch == 150
    assert load_config({"network": "sres18"}).data_path == "imagenet_data"


def test_weights_that_record_nothing_are_read_by_their_recipe():
    config = load_config(
        {"network": "cfqkbnc", "data_path": "x"},
        checkpoint_layer={"block": "acb", "num_classes": 10},
    )
    assert (config.network, config.image_size, config.mean) == ("cifar_quick", 32, (0.5, 0.5, 0.5))
    assert (
        load_config({"network": "resnet18"}, checkpoint_layer={"num_classes": 10}).image_size == 224
    )


def test_booleans_take_words_and_digits():
    for text, value in (("1", True), ("0", False), ("true", True), ("False", False)):
        assert load_config({"run_eval": text}).run_eval is value


def test_every_list_can_be_set_on_the_command_line():
    config = load_config(
        {"crop_scale": "0.2,0.9", "mean": "[0.1, 0.2, 0.3]", "color_jitter": "0 0 0"}
    )
    assert (
        config.crop_scale == (0.2, 0.9)
        and config.mean == (0.1, 0.2, 0.3)
        and config.color_jitter == (0, 0, 0)
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"lr": "fast"}, "lr=fast"),
        ({"crop_scale": "0.5"}, "crop_scale"),
        ({"crop_scale": "0.9,0.2"}, "rising"),
        ({"momentum": "1"}, "momentum=1"),
        ({"std": "0,1,1"}, "std"),
        ({"lr": "nan"}, "lr=nan"),
        ({"eval_resize": "100"}, "eval_resize=100"),
        ({"num_parallel_workers": "100000"}, "num_parallel_workers=100000: .*256"),
        ({"eta_min": "0.5"}, "eta_min=0.5 must not be above lr=0.4"),
        ({"lr_epochs": "60,30"}, "lr_epochs=.* must be rising"),
    ],
)
def test_values_out_of_range_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        load_config({"data_path": "x", **flags})


def test_sizes_are_compared_when_the_checkpoint_has_told_its_own():
    flags = {"data_path": "x", "eval_resize": "40"}
    load_config({**flags, "checkpoint_file_path": "best.ckpt"})
    recorded = {"network": "cifar_quick", "image_size": 32}
    assert load_config(flags, checkpoint_layer=recorded).resized_side == 40
    with pytest.raises(UserError, match="eval_resize=40 must not be below image_size=48"):
        load_config(flags, checkpoint_layer={**recorded, "image_size": 48})


def test_a_crop_fraction_wins_over_the_size_that_a_checkpoint_records():
    recorded = {"network": "cifar_quick", "image_size": 32, "eval_resize": 48}
    assert load_config({}, checkpoint_layer=recorded).resized_side == 48
    assert load_config({"crop_pct": "0.5"}, checkpoint_layer=recorded).resized_side == 64
    both = {"crop_pct": "0.5", "eval_resize": "36"}
    assert load_config(both, checkpoint_layer=recorded).resized_side == 36


def test_the_crop_keeps_its_fraction_at_another_image_size():
    recorded = {"network": "cifar_quick", "image_size": 32, "eval_resize": 48}
    assert load_config({"image_size": "16"}, checkpoint_layer=recorded).resized_side == 24
    both = {"image_size": "16", "eval_resize": "20"}
    assert load_config(both, checkpoint_layer=recorded).resized_side == 20
    both = {"image_size": "16", "crop_pct": "0.8"}
    assert load_config(both, checkpoint_layer=recorded).resized_side == 20


@pytest.mark.parametrize(
    "text,message",
    [
        ("learning_rate: 1", "unknown key 'learning_rate'"),
        ("lr: [", "not valid YAML at line"),
        ("- a", "key: value"),
        ("max_epochs: 3", "did you mean 'max_epoch'"),
    ],
)
def test_bad_recipe_is_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config({"config_path": str(tmp_path / "r.yaml")})


def test_resolved_configuration_reads_back():
    config = load_config({"config_path": "digits", "lr": "0.3"})
    assert Config(**yaml.safe_load(config.to_yaml())) == config


def test_what_keys_affect():
    """What a user relies on.

    Some keys may be changed when a run is resumed, some are taken from a checkpoint, and some
    compile another graph.
    """
    fixed = keys_affecting(Affects.MODEL, Affects.GRAPH, Affects.TRAINING)
    assert {
        "lr",
        "seed",
        "optimizer",
        "augmentations",
        "max_epoch",
        "network",
        "label_smooth_factor",
        "gradient_compression",
    } <= fixed
    assert not fixed & {
        "data_path",
        "output_path",
        "max_steps",
        "log_interval",
        "per_batch_size",
        "global_batch_size",
        "device_target",
        "num_parallel_workers",
        "keep_checkpoint_max",
        "eval_interval",
        "resume",
        "compile_cache",
        "stall_timeout_s",
    }
    recorded = keys_affecting(Affects.MODEL, Affects.IMAGES, Affects.BATCH)
    assert {
        "network",
        "block",
        "image_size",
        "eval_resize",
        "mean",
        "std",
        "data_path",
        "eval_data_path",
    } <= recorded
    assert not recorded & {
        "device_target",
        "eval_engine",
        "result_path",
        "lr",
        "output_path",
        "checkpoint_file_path",
    }
    compiled = keys_affecting(Affects.MODEL, Affects.GRAPH)
    assert {
        "network",
        "block",
        "mean",
        "std",
        "dropout",
        "label_smooth_factor",
        "amp_level",
    } <= compiled
    assert not compiled & {"lr", "seed", "max_epoch", "momentum", "optimizer"}


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 0.3\nmomentum: 0.8\nbackbone: resnet18\n")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nlr: 0.2\n")
    (tmp_path / "last.yaml").write_text("extends: middle.yaml\nmomentum: 0.7\n")
    assert read_recipe(tmp_path / "last.yaml") == {
        "lr": "0.2",
        "momentum": "0.7",
        "network": "resnet18",
    }
    config = load_config(
        {"config_path": str(tmp_path / "last.yaml"), "data_path": "x", "lr": "0.1"}
    )
    assert (config.lr, config.momentum, config.network) == (0.1, 0.7, "resnet18")


@pytest.mark.parametrize(
    "texts,message",
    [
        (("extends: b", "extends: a"), "leads back to this recipe"),
        (("extends: a",), "leads back to this recipe"),
        (("extends: digit",), "did you mean 'digits'"),
        (("extends: [a]",), "no configuration file"),
    ],
)
def test_a_recipe_that_extends_wrongly_is_named(tmp_path, texts, message):
    for name, text in zip("ab", texts):
        (tmp_path / f"{name}.yaml").write_text(
            text.replace("extends: a", "extends: a.yaml").replace("extends: b", "extends: b.yaml")
        )
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "flags,smoothing",
    [
        ({}, 0.1),
        ({"label_smooth": "0"}, 0),
        ({"label_smooth": "1"}, 0.1),
        ({"label_smooth_factor": "0"}, 0),
        ({"label_smooth": "0", "label_smooth_factor": "0.2"}, 0),
        ({"label_smooth": "1", "label_smooth_factor": "0.2"}, 0.2),
        # The digits' recipe has no smoothing; the seeds' flag switches it on.
        ({"config_path": "digits"}, 0),
        ({"config_path": "digits", "label_smooth": "1"}, 0.1),
    ],
)
def test_the_seeds_switch_of_label_smoothing_is_an_alias(flags, smoothing):
    config = load_config({"data_path": "x", "label_smooth_over": "all", **flags})
    assert config.smoothing == smoothing and "label_smooth" not in config.model_dump()


@pytest.mark.parametrize(
    "below,above,flags,expected",
    [
        ("label_smooth: 0", "", {"label_smooth_factor": "0.3"}, {"label_smooth_factor": 0.3}),
        ("label_smooth: 1", "", {"label_smooth_factor": "0"}, {"label_smooth_factor": 0}),
        ("label_smooth: 0", "label_smooth_factor: 0.3", {}, {"label_smooth_factor": 0.3}),
        ("eval_resize: 40", "crop_pct: 0.5", {}, {"eval_resize": 0, "crop_pct": 0.5}),
        ("eval_resize: 40", "", {"crop_pct": "0.5"}, {"eval_resize": 0, "crop_pct": 0.5}),
        ("global_batch_size: 64", "batch_size: 16", {}, {"global_batch_size": 0}),
        ("crop_pct: 0.5", "eval_resize: 40", {}, {"eval_resize": 40}),
    ],
)
def test_a_layer_wins_over_other_keys_below_it(tmp_path, below, above, flags, expected):
    (tmp_path / "base.yaml").write_text(f"image_size: 32\n{below}\n")
    (tmp_path / "child.yaml").write_text(f"extends: base.yaml\n{above}\n")
    config = load_config({"data_path": "x", "config_path": f"{tmp_path}/child.yaml", **flags})
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_key_and_its_other_name_in_one_recipe_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nmax_epoch: 5\n")
    with pytest.raises(UserError, match="has 'max_epoch' twice, once under another name"):
        load_config({"data_path": "x", "config_path": f"{tmp_path}/a.yaml"})


def test_a_path_of_a_recipe_begins_in_the_current_folder(tmp_path, monkeypatch):
    """As every other path, also if this program has a file of that name."""
    (tmp_path / "configs").mkdir()
    for name in ("default_config.yaml", "configs/digits.yaml"):
        (tmp_path / name).write_text("lr: 0.0123\n")
    monkeypatch.chdir(tmp_path)
    for path in ("default_config.yaml", "./configs/digits.yaml"):
        assert load_config({"data_path": "x", "config_path": path}).lr == 0.0123
    assert load_config({"data_path": "x", "config_path": "digits"}).lr != 0.0123


def test_a_changed_file_of_defaults_is_refused(monkeypatch, tmp_path):
    """Nobody reads it, so that a value that is changed there would have no effect."""
    from src.cli import recipes

    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(recipes, "DEFAULT_CONFIG", file)
    recipes.check_default_config()
    file.write_text(default_yaml())
    recipes.check_default_config()
    file.write_text(default_yaml().replace("lr: 0.4", "lr: 0.1"))
    with pytest.raises(UserError, match="default_config.yaml was changed.*--config_path=FILE"):
        recipes.check_default_config()


@pytest.mark.parametrize(
    "flags,warning",
    [
        ({"lr_epochs": "5"}, "--lr_epochs changes nothing without --lr_scheduler=step|exponential"),
        ({"lr_epochs": "5", "lr_scheduler": "step"}, None),
        ({"crop_padding": "2"}, "--crop_padding changes nothing without --train_crop=padded"),
        ({"momentum": "0.8", "optimizer": "adamw(beta2=0.95)"}, "optimizer=momentum|nesterov|lars"),
        ({"momentum": "0.8", "optimizer": "lars(trust=0.01)"}, None),
        ({"flip_probability": "0.1", "augmentations": "crop"}, "without --augmentations=flip"),
        ({"flip_probability": "0.1", "augmentations": "crop,flip()"}, None),
        ({"gamma_init": "0.5"}, "without --block=acb|repvgg|dbb"),
        ({"dropout": "0.3"}, "without --network=alexnet|mobilenet_v2"),
        ({"dropout": "0.3", "network": "mobilenetv2"}, None),
        ({"loss_scale": "8"}, "without --amp_level=O2 on GPU or Ascend"),
        ({"label_smooth_over": "all", "label_smooth_factor": "0"}, "--label_smooth_factor"),
        ({"allow_head_mismatch": "1"}, "without --checkpoint_file_path"),
        ({"eval_data_path": "y"}, "without --run_eval=1"),
        ({"eval_interval": "3"}, "without --run_eval=1"),
        ({"eval_interval": "3", "val_split": "0.1"}, None),
        ({"lr_interval": "step", "lr_scheduler": "one_cycle"}, "without --lr_scheduler"),
        ({"run_eval": "0", "val_split": "0.1"}, "with --val_split"),
        (
            {"flip_probability": "0.7", "augmentations": "crop, flip(probability=0.2)"},
            "with --augmentations=flip(probability=0.2)",
        ),
        ({"flip_probability": "0.7", "augmentations": "crop,flip(probability=0.2)"}, "flip("),
        (
            {"crop_pct": "0.9", "eval_resize": "256"},
            "--crop_pct changes nothing with --eval_resize",
        ),
        ({"crop_pct": "0.9"}, None),
        ({"per_batch_size": "8", "global_batch_size": "16"}, "with --global_batch_size"),
        ({"warmup_epochs": "2", "lr_scheduler": "one_cycle"}, "without --lr_scheduler=cosine"),
        ({"warmup_epochs": "2", "lr_scheduler": "cosine_restarts(period=3)"}, None),
        ({"decay_norm_and_bias": "1", "weight_decay": "0"}, "without --weight_decay"),
        ({"crop_scale": "0.5,1", "augmentations": "flip"}, "without --augmentations=crop"),
        ({"crop_scale": "0.5,1", "train_crop": "resize"}, "--train_crop=random_resized"),
        ({"amp_level": "O2", "loss_scale": "512"}, "without --amp_level=O2 on GPU or Ascend"),
        ({"amp_level": "O2", "loss_scale": "512", "device_target": "GPU"}, None),
        ({"gradient_compression": "float16"}, "changes nothing on a single rank"),
        (
            {"momentum": "0.95", "optimizer": "momentum(momentum=0.5)"},
            "with --optimizer=momentum(momentum=0.5)",
        ),
    ],
)
def test_a_flag_that_changes_nothing_is_told(flags, warning):
    config = load_config({"data_path": "x", **flags})
    messages = flags_without_effect(flags, config, ranks=1)
    if warning is None:
        assert not messages
    else:
        assert len(messages) == 1 and messages[0].startswith("warning: ") and warning in messages[0]


def test_each_need_names_a_key_and_values_that_it_takes():
    values = default_values() | {"scales_loss": False, "evaluates": True}
    for name in Config.model_fields:
        needs, _, wanted = key_info(name).needs.partition("=")
        assert not needs or needs in values, name
        for value in wanted.split("|") if wanted else ():
            load_config({"data_path": "x", "file_format": "ONNX", needs: value})


def test_a_flag_of_other_commands_is_told():
    assert misplaced_flags({"lr": "1", "data_path": "x", "config_path": "y"}, "eval") == [
        "warning: --lr changes nothing here; it is a flag of train.py"
    ]
    assert len(misplaced_flags({"gamma_init": "0.5", "dropout": "0.1"}, "eval")) == 2
    assert misplaced_flags({"lr": "1", "data_path": "x"}, "train") == []


@pytest.mark.parametrize(
    "text,message",
    [
        ("lr: 0.1\nlr: 0.2\n", "has 'lr' twice"),
        ("max_epoch: 1:30\n", "max_epoch=1:30"),
        ("lr: true\n", "lr=True: must be a number"),
        ("mean: [127.5, 127.5, 127.5]\n", r"must be in \[0, 1\]"),
        ("mean: [0.5]\n", "needs 3 numbers"),
    ],
)
def test_values_that_yaml_reads_otherwise_are_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config({"config_path": str(tmp_path / "recipe.yaml")})


def test_numbers_of_a_recipe_are_those_of_flags(tmp_path):
    (tmp_path / "recipe.yaml").write_text("per_batch_size: 010\nlr: 1e-3\nmean: [0.5, .5, 5e-1]\n")
    config = load_config({"config_path": str(tmp_path / "recipe.yaml")})
    assert (config.per_batch_size, config.lr, config.mean) == (10, 0.001, (0.5, 0.5, 0.5))


def test_a_recipes_own_batch_goes_before_that_of_the_one_it_extends(tmp_path):
    (tmp_path / "recipe.yaml").write_text("extends: digits\nper_batch_size: 24\n")
    config = load_config({"config_path": str(tmp_path / "recipe.yaml")})
    assert (config.per_batch_size, config.global_batch_size) == (24, 0)


def test_the_image_size_scales_the_resize_of_a_recipe(tmp_path):
    """Recipes have numbers as text, so that it stayed, and accuracies were far too low."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("extends: digits\nimage_size: 32\neval_resize: 36\n")
    assert load_config({"config_path": str(recipe), "image_size": "16"}).eval_resize == 18
    assert load_config({"config_path": str(recipe)}).eval_resize == 36
    recipe.write_text("network: resnet18\neval_resize: 256\n")
    config = load_config({"config_path": str(recipe), "image_size": "112", "data_path": "x"})
    assert config.eval_resize == 128
    recipe.write_text("network: resnet56_cifar\neval_resize: 36\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {recipe}\nimage_size: 24\n")
    assert load_config({"config_path": str(child), "data_path": "x"}).eval_resize == 27
