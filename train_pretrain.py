"""Pretrain a GPT from scratch on plain text ({"text": "..."} rows).

python train_pretrain.py                                            one process, the sample data
torchrun --nproc_per_node 2 train_pretrain.py --n_layers 16 --dim 768 --use_wandb
"""

from training import PretrainConfig, run_stage


def main(asked: PretrainConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    import torch

    from training import NextToken, build_engine, train
    from training.setup import load_data, run_identity, start_machine, starting_model

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model: random weights, the same for one seed whatever the number of processes
    start = starting_model(asked)

    # 3. Data: tokenized once, packed into rows of max_seq_len
    data = load_data(start, machine)

    # 4. What is optimised: the next token
    objective = NextToken(torch.from_numpy(start.tokenizer.token_bytes))

    # 5. How it is spread
    identity = run_identity(start, data)
    engine = build_engine(start.model, start.config, machine, start.weights)

    # 6. Train, and leave a Hugging Face model folder
    train(engine, objective, data.train, data.val, start, identity)


if __name__ == "__main__":
    run_stage(main, PretrainConfig)
