"""What a flag of MiniMind, nanochat, LitGPT or the Hugging Face Trainer is called here, or why there is none.

    answer("--hidden_size", ["dim", ...])       -> "here it is --dim"
    answer("--use_moe", ["dim", ...])           -> "no such thing here: every network is dense"
    answer("--lerning_rate", ["learning_rate"]) -> "did you mean --learning_rate?"

By meaning first; the nearest spelling answers only what ELSEWHERE does not know.
"""

import difflib
import re

NOT_HERE = "no such thing here: "

ELSEWHERE = {  # their name, `_` for `-`: ours, or a sentence; of several parted by " | " the first whose flags exist
    # the network
    "hidden_size": "--dim",
    "n_embd": "--dim",
    "d_model": "--dim",
    "aspect_ratio": "--dim",
    "num_hidden_layers": "--n_layers",
    "num_layers": "--n_layers",
    "n_layer": "--n_layers",
    "depth": "--n_layers",
    "num_attention_heads": "--n_heads",
    "n_head": "--n_heads",
    "num_heads": "--n_heads",
    "num_key_value_heads": "--n_kv_heads",
    "n_kv_head": "--n_kv_heads",
    "n_query_groups": "--n_kv_heads",
    "head_dim": "it is --dim divided by --n_heads",
    "head_size": "it is --dim divided by --n_heads",
    "intermediate_size": "--ffn_dim",
    "hidden_dim": "--ffn_dim",
    "padded_vocab_size": "--vocab_size",
    "max_position_embeddings": "--max_seq_len",
    "max_seq_length": "--max_seq_len",
    "max_length": "--max_seq_len",
    "sequence_len": "--max_seq_len",
    "seq_len": "--max_seq_len",
    "block_size": "--max_seq_len",
    "max_prompt_length": "--max_seq_len bounds prompt and answer together",
    "rope_base": "--rope_theta",
    "rms_norm_eps": "--norm_eps",
    "tie_word_embeddings": "--tie_embeddings",
    "attention_dropout": "--dropout",
    "use_moe": NOT_HERE + "every network is dense",
    "n_routed_experts": NOT_HERE + "every network is dense",
    "num_experts": NOT_HERE + "every network is dense",
    "num_experts_per_tok": NOT_HERE + "every network is dense",
    "n_shared_experts": NOT_HERE + "every network is dense",
    "flash_attn": NOT_HERE + "torch picks the attention kernel",
    "attn_implementation": NOT_HERE + "torch picks the attention kernel",
    "window_pattern": NOT_HERE + "attention looks at the whole document",
    "bias": NOT_HERE + "networks have no biases",
    "inference_rope_scaling": NOT_HERE + "a folder's rope_scaling is kept as its config.json says",
    "model_name": "--init_from FOLDER, or a shape by --dim and --n_layers | --model FOLDER",
    "model_config": "a shape is given by --dim and --n_layers",
    # files and folders
    "save_dir": "--out_dir",
    "output_dir": "--out_dir",
    "overwrite_output_dir": "--resume none starts over",
    "save_weight": "--run_name NAME | --out_dir FOLDER; run folders in it are named by stage and width",
    "model_tag": "--run_name NAME | --out_dir FOLDER; run folders in it are named by stage and width",
    "from_weight": "--init_from FOLDER",
    "pretrained_path": "--init_from FOLDER",
    "initial_checkpoint_dir": "--init_from FOLDER",
    "checkpoint_dir": "--init_from FOLDER to start from a model, --resume FOLDER to go on | --model FOLDER",
    "model_name_or_path": "--init_from FOLDER | --model FOLDER",
    "model_path": "--init_from FOLDER | --model FOLDER",
    "load_from": "--init_from FOLDER | --model FOLDER",
    "load": "--init_from FOLDER | --model FOLDER",
    "model_step": "--init_from FOLDER | --model FOLDER",
    "weight": "--init_from FOLDER | --model_mode (0 pretrain, 1 full_sft, 2 dpo), or --model FOLDER",
    "source": "--init_from FOLDER | --model_mode (0 pretrain, 1 full_sft, 2 dpo), or --model FOLDER",
    "ref_model": "the reference is the folder of --init_from | --reference FOLDER",
    "from_resume": "--resume, which is auto by default: the same command goes on",
    "resume_from_checkpoint": "--resume FOLDER; auto, the default, takes the newest checkpoint of the run",
    "resume_from_step": "--resume FOLDER; auto, the default, takes the newest checkpoint of the run",
    "load_optimizer": NOT_HERE + "a stage starts with a fresh optimizer, a resumed run with its own",
    "data": "--data_path",
    "data_dir": "--data_path",
    "train_file": "--data_path",
    "dataset": "--data_path",
    "dataset_name": "--data_path; files are read from disk, none is fetched",
    "val_file": "--val_path",
    "validation_file": "--val_path",
    "val_split_fraction": "--val_fraction",
    "validation_split_percentage": "--val_fraction, a share from 0 to 1",
    "test_size": "--val_fraction",
    "tokenizer_dir": "--tokenizer FOLDER",
    "tokenizer_path": "--tokenizer FOLDER",
    "tokenizer_name": "--tokenizer FOLDER",
    "tokenizer_name_or_path": "--tokenizer FOLDER",
    "max_train_samples": "--max_steps; all rows of --data_path are read",
    "packing": NOT_HERE + "rows are always packed, and attention never crosses documents",
    "group_by_length": NOT_HERE + "rows are always packed, and attention never crosses documents",
    "num_workers": NOT_HERE + "tokens are cached on disk and read ahead by a thread",
    "dataloader_num_workers": NOT_HERE + "tokens are cached on disk and read ahead by a thread",
    "preprocessing_num_workers": NOT_HERE + "tokens are cached on disk and read ahead by a thread",
    "push_to_hub": NOT_HERE + "a run folder is a Hugging Face folder; upload it with their tool",
    "train": "keys are flat here: what stands under train is a key of its own, as micro_batch_size is batch_size",
    "eval": "keys are flat here: what stands under eval is a key of its own, as interval is eval_interval",
    # how much, how fast
    "num_train_epochs": "--epochs",
    "num_epochs": "--epochs",
    "num_iterations": "--max_steps",
    "max_iters": "--max_steps",
    "max_tokens": "--max_steps or --epochs | --max_new_tokens",
    "max_time": NOT_HERE + "Ctrl-C or SIGTERM saves and ends, and the same command goes on",
    "target_flops": "--max_steps",
    "target_param_data_ratio": "--max_steps",
    "per_device_train_batch_size": "--batch_size",
    "per_device_eval_batch_size": "--batch_size",
    "per_gpu_train_batch_size": "--batch_size",
    "device_batch_size": "--batch_size",
    "micro_batch_size": "--batch_size",
    "train_batch_size": "--batch_size",
    "total_batch_size": "--global_batch_size, which counts rows, not tokens",
    "gradient_accumulation_steps": "--accumulation_steps",
    "gradient_accumulation_iters": "--accumulation_steps",
    "grad_accum_steps": "--accumulation_steps",
    "accumulate_grad_batches": "--accumulation_steps",
    "lr": "--learning_rate",
    "max_lr": "--learning_rate",
    "init_lr_frac": "--learning_rate",
    "embedding_lr": "--learning_rate, one for all parameters",
    "unembedding_lr": "--learning_rate, one for all parameters",
    "matrix_lr": "--learning_rate, one for all parameters",
    "scalar_lr": "--learning_rate, one for all parameters",
    "final_lr_frac": "--min_lr, a rate, not a share",
    "warmup_iters": "--warmup_steps",
    "lr_warmup_steps": "--warmup_steps",
    "warmup_ratio": "--warmup_steps, in steps",
    "lr_warmup_fraction": "--warmup_steps, in steps",
    "warmdown_ratio": "--decay_fraction, with --lr_schedule wsd",
    "lr_scheduler_type": "--lr_schedule cosine or wsd",
    "lr_decay_iters": NOT_HERE + "the rate falls until the last step",
    "max_grad_norm": "--grad_clip",
    "max_norm": "--grad_clip",
    "clip_grad": "--grad_clip",
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "adam_epsilon": NOT_HERE + "it is 1e-8",
    "optim": "--optimizer adamw or muon",
    "optimizer_type": "--optimizer adamw or muon",
    "label_smoothing_factor": NOT_HERE + "the loss is plain cross-entropy",
    "neftune_noise_alpha": NOT_HERE + "embeddings get no noise",
    "data_seed": "--seed",
    "beta": "a flag of train_dpo.py",
    "loss_type": "a flag of train_dpo.py",
    # the machine
    "device_type": "--device",
    "use_cpu": "--device cpu",
    "no_cuda": "--device cpu",
    "precision": "--dtype float32, bfloat16 or float16",
    "mixed_precision": "--dtype float32, bfloat16 or float16",
    "torch_dtype": "--dtype float32, bfloat16 or float16",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "fp32": "--dtype float32",
    "tf32": NOT_HERE + "--dtype float32 uses it on a GPU by itself",
    "fp8": NOT_HERE + "--dtype takes float32, bfloat16 and float16",
    "use_compile": "--compile",
    "torch_compile": "--compile",
    "gradient_checkpointing": "--grad_checkpointing",
    "use_ddp": "--engine ddp; under torchrun it is the default",
    "ddp": "--engine ddp; under torchrun it is the default",
    "fsdp": "--engine fsdp",
    "strategy": "--engine ddp, fsdp or deepspeed",
    "deepspeed": "--deepspeed_config FILE; --engine deepspeed needs none",
    "zero": "--zero_stage",
    "ddp_timeout": "--comm_timeout",
    "devices": "the number of processes is the launcher's: torchrun --nproc_per_node N",
    "num_gpus": "the number of processes is the launcher's: torchrun --nproc_per_node N",
    "n_gpu": "the number of processes is the launcher's: torchrun --nproc_per_node N",
    "num_processes": "the number of processes is the launcher's: torchrun --nproc_per_node N",
    "num_nodes": "the number of nodes is the launcher's: torchrun --nnodes N",
    # what is reported
    "logging_steps": "--log_interval",
    "log_every": "--log_interval",
    "eval_steps": "--eval_interval",
    "eval_every": "--eval_interval",
    "eval.interval": "--eval_interval",
    "eval_strategy": "--eval_interval, in steps",
    "evaluation_strategy": "--eval_interval, in steps",
    "eval.max_iters": "--eval_rows",
    "eval_iters": "--eval_rows",
    "eval_tokens": "--eval_rows, in packed rows",
    "save_steps": "--save_interval",
    "save_every": "--save_interval",
    "save_strategy": "--save_interval, in steps",
    "save_total_limit": "--keep_last",
    "load_best_model_at_end": "--keep_best | no such thing here: --keep_last keeps the newest checkpoints",
    "early_stopping_patience": "--patience | no such thing here: a run ends after --epochs or --max_steps",
    "sample_every": "--sample_interval",
    "report_to": "--use_wandb or --use_tensorboard",
    "logger_name": "--use_wandb or --use_tensorboard",
    "wandb_log": "--use_wandb",
    "use_swanlab": "--use_wandb",
    "run": "--wandb_run_name with --use_wandb",
    "run_name": "--wandb_run_name with --use_wandb",
    "project": "--wandb_project",
    "project_name": "--wandb_project",
    "core_metric_every": NOT_HERE + "eval_model.py scores files of rows, after training",
    "chatcore_every": NOT_HERE + "eval_model.py scores files of rows, after training",
    "do_train": NOT_HERE + "train_*.py trains, eval_model.py scores",
    "do_eval": NOT_HERE + "train_*.py trains, eval_model.py scores",
    # other ways of training
    "lora_name": "--run_name with --adapter lora",
    "lora_weight": "--init_from a folder of an adapter | --adapter FOLDER",
    "lora_r": "--lora_rank with --adapter lora",
    "use_rslora": "--lora_rslora",
    "use_dora": "--lora_dora",
    "lora_target_modules": "--lora_targets",
    "use_peft": "--adapter lora",
    "quantize": NOT_HERE + "weights are not quantized",
    "load_in_4bit": NOT_HERE + "weights are not quantized",
    "load_in_8bit": NOT_HERE + "weights are not quantized",
    "teacher_hidden_size": NOT_HERE + "models are not distilled",
    "num_generations": NOT_HERE + "DPO is the only preference training; nothing samples while it trains",
    "reward_model_path": NOT_HERE + "DPO is the only preference training; nothing samples while it trains",
    # talking
    "temperature": "a flag of eval_model.py",
    "top_k": "a flag of eval_model.py",
    "top_p": "a flag of eval_model.py",
    "max_new_tokens": "a flag of eval_model.py",
    "model_mode": "--init_from FOLDER; eval_model.py has this flag",
    "max_gen_len": "--max_new_tokens | eval_model.py sets how long answers get",
    "max_output_tokens": "--max_new_tokens | eval_model.py sets how long answers get",
    "historys": NOT_HERE + "all of a conversation that fits the context is kept; /reset forgets it",
    "history": NOT_HERE + "all of a conversation that fits the context is kept; /reset forgets it",
    "history_cnt": NOT_HERE + "all of a conversation that fits the context is kept; /reset forgets it",
    "system_prompt": "--system TEXT | eval_model.py sets it",
    "open_thinking": NOT_HERE + "a model thinks as it was trained to",
    "enable_thinking": NOT_HERE + "a model thinks as it was trained to",
    "show_speed": NOT_HERE + "answers are printed alone",
    "stream": NOT_HERE + "answers always come piece by piece",
    "do_sample": "--temperature; 0 is greedy | eval_model.py samples",
    "trust_remote_code": NOT_HERE + "no code of a model folder is run",
}

LAUNCHER = {"nproc_per_node", "nnodes"}  # flags in the sentences above that are torchrun's


def answer(found: str, names: list[str], prefix: str = "--", training: tuple[str, ...] = ()) -> str:
    """What to say of an unknown flag or key: ours by meaning, else the nearest spelling.

    names: those that exist where it was given; training: where those are not the training scripts', theirs.
    prefix: what stands before a name where it was given, "" in a file.
    """
    name = found.lstrip("-").split("=")[0].replace("-", "_")
    last = name.rpartition(".")[2]  # LitGPT's train.micro_batch_size
    sentences = [*ELSEWHERE.get(name, "").split(" | "), *ELSEWHERE.get(last, "").split(" | "), f"--{last}"]
    for flags, lead in (names, "here it is "), (training, "in the training scripts it is "):
        for sentence in filter(None, sentences):
            ours = set(re.findall(r"--(\w+)", sentence)) - LAUNCHER
            if ours <= set(flags):
                said = lead + sentence if sentence.startswith("--") else sentence
                return re.sub(rf"--({'|'.join(ours)})\b", rf"{prefix}\1", said) if ours else said
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {prefix}{nearest[0]}?" if nearest else "--help lists them all"


def unknown_names(found: list[str], names: list[str], kind: str, prefix: str, training: tuple[str, ...] = ()) -> str:
    """One line for each that is unknown, with its answer."""
    return "\n".join(f"unknown {kind} {each}; {answer(each, names, prefix, training)}" for each in found)


def flags_among(extra: list[str]) -> list[str]:
    """What argparse did not know, without the values that came with unknown flags."""
    flags = [text for text in extra if re.match(r"--?[A-Za-z]", text)]
    return flags or extra[:1]
