"""Which flag, key or value was meant: names that other trainers use, else the nearest spelling."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

# What users of PEFT, TRL, Lit-GPT, torchtune and Axolotl type, and what it is called here: the first name that the
# command has.
ALIASES: dict[str, Sequence[str]] = {
    # data, checkpoints, folders
    "model": ("--checkpoint_dir", "--repo_id"),
    "model_id": ("--checkpoint_dir", "--repo_id"),
    "model_name": ("--checkpoint_dir", "--repo_id"),
    "model_path": ("--checkpoint_dir", "--repo_id"),
    "model_name_or_path": ("--checkpoint_dir", "--repo_id"),
    "pretrained_model_name_or_path": ("--checkpoint_dir", "--repo_id"),
    "tokenizer_name_or_path": ("--checkpoint_dir",),
    "checkpoint": ("--checkpoint_dir",),
    "base_model": ("--base_dir", "--checkpoint_dir"),
    "adapter": ("--init_adapter", "--checkpoint_dir"),
    "adapter_path": ("--init_adapter", "--checkpoint_dir"),
    "adapter_dir": ("--init_adapter", "--checkpoint_dir"),
    "adapter_name_or_path": ("--init_adapter", "--checkpoint_dir"),
    "lora_model_dir": ("--init_adapter", "--checkpoint_dir"),
    "lora_path": ("--init_adapter", "--checkpoint_dir"),
    "pretrained_checkpoint_dir": ("--base_dir",),
    "repo": ("--repo_id",),
    "branch": ("--revision",),
    "token": ("--access_token",),
    "hf_token": ("--access_token",),
    "hub_token": ("--access_token",),
    "use_auth_token": ("--access_token",),
    "local_dir": ("--checkpoint_root",),
    "cache_dir": ("--checkpoint_root",),
    "data": ("--data_dir", "--source"),
    "data_path": ("--data_dir", "--source"),
    "data_file": ("--data_dir", "--source"),
    "dataset": ("--data_dir", "--source"),
    "dataset_name": ("--data_dir", "--source"),
    "datasets": ("--data_dir", "--source"),
    "dataset.source": ("--data_dir",),
    "train_file": ("--data_dir", "--source"),
    "json_path": ("--source",),
    "file": ("--source",),
    "input": ("--source", "--prompt"),
    "test_split_fraction": ("--val_split_fraction",),
    "val_split": ("--val_split_fraction",),
    "validation_split": ("--val_split_fraction",),
    "val_set_size": ("--val_split_fraction",),
    "output": ("--out_dir", "--destination_path"),
    "output_dir": ("--out_dir", "--destination_path", "--checkpoint_root"),
    "out": ("--out_dir", "--destination_path"),
    "save_dir": ("--out_dir", "--destination_path"),
    "save_path": ("--out_dir", "--destination_path"),
    "overwrite_output_dir": ("--overwrite",),
    "prompt_template": ("--prompt_style",),
    "chat_template": ("--prompt_style chat",),
    "template": ("--prompt_style",),
    "train_on_inputs": ("--mask_prompt false",),
    "train_on_input": ("--mask_prompt false",),
    "completion_only_loss": ("--mask_prompt",),
    "assistant_only_loss": ("--mask_prompt",),
    # optimization
    "lr": ("--train.learning_rate",),
    "learning_rate": ("--train.learning_rate",),
    "max_lr": ("--train.learning_rate",),
    "min_lr": ("--train.min_lr",),
    "min_learning_rate": ("--train.min_lr",),
    "bs": ("--train.global_batch_size",),
    "batch_size": ("--train.global_batch_size",),
    "train_batch_size": ("--train.global_batch_size",),
    "per_device_train_batch_size": ("--train.micro_batch_size",),
    "per_device_eval_batch_size": ("--train.micro_batch_size",),
    "micro_batch_size": ("--train.micro_batch_size",),
    "gradient_accumulation_steps": ("--train.global_batch_size",),
    "gradient_accumulation_iters": ("--train.global_batch_size",),
    "grad_accum": ("--train.global_batch_size",),
    "epoch": ("--train.epochs",),
    "epochs": ("--train.epochs",),
    "num_epochs": ("--train.epochs",),
    "num_train_epochs": ("--train.epochs",),
    "max_epochs": ("--train.epochs",),
    "steps": ("--train.max_steps",),
    "num_steps": ("--train.max_steps",),
    "max_train_steps": ("--train.max_steps",),
    "max_steps_per_epoch": ("--train.max_steps",),
    "train.max_tokens": ("--train.max_steps",),
    "max_iters": ("--train.max_steps",),
    "iters": ("--train.max_steps",),
    "max_length": ("--train.max_seq_length", "--max_new_tokens"),
    "max_seq_len": ("--train.max_seq_length",),
    "max_seq_length": ("--train.max_seq_length",),
    "model_max_length": ("--train.max_seq_length",),
    "cutoff_len": ("--train.max_seq_length",),
    "sequence_len": ("--train.max_seq_length",),
    "block_size": ("--train.max_seq_length",),
    "warmup": ("--train.lr_warmup_steps",),
    "warmup_steps": ("--train.lr_warmup_steps",),
    "num_warmup_steps": ("--train.lr_warmup_steps",),
    "warmup_ratio": ("--train.lr_warmup_fraction",),
    "warmup_fraction": ("--train.lr_warmup_fraction",),
    "optim": ("--optimizer",),
    "wd": ("--optimizer.init_args.weight_decay",),
    "weight_decay": ("--optimizer.init_args.weight_decay",),
    "train.weight_decay": ("--optimizer.init_args.weight_decay",),
    "adam_beta1": ("--optimizer.init_args.betas",),
    "adam_beta2": ("--optimizer.init_args.betas",),
    "betas": ("--optimizer.init_args.betas",),
    "adam_epsilon": ("--optimizer.init_args.eps",),
    "max_grad_norm": ("--train.max_norm",),
    "gradient_clip_val": ("--train.max_norm",),
    "grad_clip": ("--train.max_norm",),
    "clip_grad_norm": ("--train.max_norm",),
    "gradient_checkpointing": ("--train.activation_checkpointing true",),
    "grad_checkpointing": ("--train.activation_checkpointing true",),
    "enable_activation_checkpointing": ("--train.activation_checkpointing true",),
    "activation_checkpointing": ("--train.activation_checkpointing true",),
    "random_seed": ("--seed",),
    "manual_seed": ("--seed",),
    # saving, logging, evaluation
    "save_steps": ("--train.save_interval",),
    "save_interval": ("--train.save_interval",),
    "save_total_limit": ("--train.save_total_limit",),
    "logging_steps": ("--train.log_interval",),
    "log_every_n_steps": ("--train.log_interval",),
    "log_interval": ("--train.log_interval",),
    "eval_steps": ("--eval.interval",),
    "eval_interval": ("--eval.interval",),
    "eval_iters": ("--eval.max_iters",),
    "load_best_model_at_end": ("--eval.keep_best true",),
    "early_stopping_patience": ("--eval.patience",),
    "report_to": ("--logger_name",),
    "logger": ("--logger_name",),
    "metric_logger": ("--logger_name",),
    "resume_from_checkpoint": ("--resume",),
    "resume_from": ("--resume",),
    "auto_resume_from_checkpoints": ("--resume auto",),
    # precision, quantization, devices
    "bf16": ("--precision bf16-true",),
    "fp16": ("--precision bf16-true",),
    "fp32": ("--precision 32-true",),
    "dtype": ("--precision",),
    "torch_dtype": ("--precision",),
    "mixed_precision": ("--precision bf16-mixed",),
    "load_in_4bit": ("--quantize bnb.nf4",),
    "load_in_8bit": ("--quantize bnb.nf4",),
    "quant": ("--quantize",),
    "quantization": ("--quantize",),
    "qlora": ("--quantize bnb.nf4",),
    "quantize_base": ("--quantize bnb.nf4-dq",),
    "bnb_4bit_quant_type": ("--quantize bnb.nf4",),
    "bnb_4bit_use_double_quant": ("--quantize bnb.nf4-dq",),
    "use_double_quant": ("--quantize bnb.nf4-dq",),
    "double_quant": ("--quantize bnb.nf4-dq",),
    "num_gpus": ("--devices",),
    "gpus": ("--devices",),
    "num_processes": ("--devices",),
    "nproc_per_node": ("--devices",),
    "nnodes": ("--num_nodes",),
    "fsdp": ("--strategy fsdp",),
    # LoRA
    "r": ("--lora_r",),
    "rank": ("--lora_r",),
    "lora_rank": ("--lora_r",),
    "lora_dim": ("--lora_r",),
    "alpha": ("--lora_alpha",),
    "dropout": ("--lora_dropout",),
    "init_lora_weights": ("--lora_init",),
    "target_modules": ("--lora_targets",),
    "lora_target_modules": ("--lora_targets",),
    "lora_target": ("--lora_targets",),
    "lora_attn_modules": ("--lora_targets",),
    "lora_target_linear": ("--lora_targets all-linear",),
    "apply_lora_to_mlp": ("--lora_mlp true",),
    "apply_lora_to_output": ("--lora_head true",),
    "rank_pattern": ("--lora_rank_pattern",),
    "alpha_pattern": ("--lora_alpha_pattern",),
    "layers_to_transform": ("--lora_layers",),
    "peft_layers_to_transform": ("--lora_layers",),
    "lora_q": ("--lora_query",),
    "lora_k": ("--lora_key",),
    "lora_v": ("--lora_value",),
    "lora_o": ("--lora_projection",),
    "use_dora": ("--lora_use_dora true",),
    "peft_use_dora": ("--lora_use_dora true",),
    "use_rslora": ("--lora_use_rslora true",),
    "peft_use_rslora": ("--lora_use_rslora true",),
    "loraplus_lr_ratio": ("--lora_plus_ratio",),
    # generation, merging
    "n": ("--num_samples", "--num_nodes"),
    "num_return_sequences": ("--num_samples",),
    "max_tokens": ("--max_new_tokens", "--train.micro_batch_tokens"),
    "max_gen_len": ("--max_new_tokens",),
    "num_tokens": ("--max_new_tokens",),
    "temp": ("--temperature",),
    "topk": ("--top_k",),
    "topp": ("--top_p",),
    "p": ("--top_p", "--prompt"),
    "do_sample": ("--temperature 0",),
    "torch_compile": ("--compile true",),
    "dequantize": ("--dequantized_base true",),
}
LORA_ALONE = "not implemented, since adapters hold LoRA weights alone"
ALWAYS = "it is always on"
ANSWERS = {
    "modules_to_save": LORA_ALONE, "lora_modules_to_save": LORA_ALONE, "trainable_token_indices": LORA_ALONE,
    "bias": LORA_ALONE, "lora_bias": LORA_ALONE,
    "packing": ALWAYS, "sample_packing": ALWAYS, "dataset.packed": ALWAYS, "flash_attention": ALWAYS,
    "lr_scheduler_type": "the schedule is cosine with warmup, down to --train.min_lr",
}  # fmt: skip
"""Settings of training that have no name here, and why."""
VALUES: dict[str, dict[str, str]] = {
    "precision": {
        "bf16": "bf16-true", "bfloat16": "bf16-true", "16-true": "bf16-true", "fp16": "bf16-true", "16": "bf16-true",
        "float16": "bf16-true", "half": "bf16-true", "16-mixed": "bf16-mixed", "mixed": "bf16-mixed",
        "32": "32-true", "fp32": "32-true", "float32": "32-true", "float": "32-true",
    },
    "quantize": {
        "nf4": "bnb.nf4", "4bit": "bnb.nf4", "int4": "bnb.nf4", "4": "bnb.nf4", "true": "bnb.nf4", "fp4": "bnb.nf4",
        "bnb.fp4": "bnb.nf4", "nf4-dq": "bnb.nf4-dq", "bnb.fp4-dq": "bnb.nf4-dq", "none": "null", "false": "null",
    },
    "lora_init": {"true": "zero", "default": "zero", "zeros": "zero", "gaussian": "zero"},
    "strategy": {"deepspeed": "fsdp", "fsdp2": "fsdp", "dp": "ddp", "zero3": "fsdp"},
}  # fmt: skip


def hint_for(flag: str, names: Collection[str]) -> str:
    """Return why a flag has no name here, or the one that was probably meant; nothing where no name is near."""
    if "lora_r" in names and (answer := ANSWERS.get(flag.lstrip("-").replace("-", "_"))):
        return answer
    near = near_flag(flag, names)
    return f"did you mean {near}?" if near else ""


def near_flag(flag: str, names: Iterable[str]) -> str | None:
    """Return the flag, with its value where there is just one, that was probably meant."""
    name, known = flag.lstrip("-").replace("-", "_").lower(), list(names)
    for candidate in [f"--{name}", *ALIASES.get(name, ()), *ALIASES.get(name.rpartition(".")[2], ())]:
        if _exists(candidate.split()[0].rstrip(","), known):
            return candidate
    near = _nearest(name, known)
    return f"--{near}" if near else None


def _exists(flag: str, known: Sequence[str]) -> bool:
    name = flag.removeprefix("--")
    return name in known or (name.startswith("optimizer.") and "optimizer" in known)


def near_key(name: str, names: Iterable[str]) -> str:
    """Say where a key of a YAML file belongs or what it is called; nothing where no name is near."""
    key, known = name.rpartition(".")[2], list(names)
    if own := [other for other in known if other.rpartition(".")[2] == key]:
        section = own[0].rpartition(".")[0]
        return f"it belongs under {section}:" if section else "it belongs at the top level"
    if "lora_r" in known and (answer := ANSWERS.get(name) or ANSWERS.get(key)):
        return answer
    flag = near_flag(key, known) or near_flag(name, known)
    if flag is None:
        return ""
    dotted, _, value = flag.removeprefix("--").partition(" ")
    return f"did you mean {_in_yaml(dotted)}?" if "," in flag or not value else f"did you mean {dotted}: {value}?"


def _in_yaml(dotted: str) -> str:
    section, _, key = dotted.rstrip(",").rpartition(".")
    return f"{key} under {section}:" if section else key


def near_value(name: str, text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that was probably meant."""
    meant = VALUES.get(name, {}).get(text.lower())
    near = [meant] if meant in choices else get_close_matches(text.lower(), choices, n=1, cutoff=0.6)
    return near[0] if near else None


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the word with the nearest spelling, if any is near."""
    near = get_close_matches(word, list(words), n=1, cutoff=0.7)
    return near[0] if near else None


def _nearest(name: str, known: Sequence[str]) -> str | None:
    by_last = {other.rpartition(".")[2]: other for other in reversed(known)}
    found = nearest(name, known) or nearest(name.rpartition(".")[2], by_last)
    return by_last.get(found, found) if found else None
