"""Pretrain a GPT from scratch on plain text ({"text": "..."} rows).

python train_pretrain.py                                            one process, the sample data
torchrun --nproc_per_node 2 train_pretrain.py --n_layers 16 --dim 768 --use_wandb
"""

import torch

from training import NextToken, PretrainConfig, build_engine, train
from training.setup import load_data, run_identity, run_stage, start_machine, starting_model


def main(config: PretrainConfig) -> None:
    # 1. Processes, device, precision
    machine = start_machine(config)

    # 2. Tokenizer and model: random weights, the same for one seed whatever the number of processes
    model, weights, tokenizer, config = starting_model(config)

    # 3. Data: tokenized once, packed into rows of max_seq_len
    data = load_data(config, tokenizer, machine.world)

    # 4. What is optimised: the next token
    objective = NextToken(torch.from_numpy(tokenizer.token_bytes))

    # 5. How it is spread
    identity = run_identity(config, weights, data)
    engine = build_engine(model, config, machine.device, machine.dtype, machine.world, weights)

    # 6. Train, and leave a Hugging Face model folder
    train(engine, objective, data, tokenizer, config, identity)


if __name__ == "__main__":
    run_stage(main, PretrainConfig)
