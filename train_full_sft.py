"""Fine-tune a pretrained model on conversations; the loss stands on the assistant's turns only.

python train_full_sft.py                                            starts from out/pretrain_512
torchrun --nproc_per_node 2 train_full_sft.py --data_path "./dataset/sft_512.jsonl" --n_layers 16 --dim 768 --use_wandb
"""

from training import SFTConfig, run_stage


def main(asked: SFTConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    from training import NextToken, build_engine, train
    from training.setup import load_data, run_identity, start_machine, starting_model

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model: those of the pretrained folder
    start = starting_model(asked)

    # 3. Data: rendered by the one chat renderer, whose mask says which tokens are the assistant's
    data = load_data(start, machine)

    # 4. What is optimised: the next token, where it is the assistant's
    objective = NextToken()

    # 5. How it is spread
    identity = run_identity(start, data)
    engine = build_engine(start.model, start.config, machine, start.weights)

    # 6. Train, and leave a Hugging Face model folder
    train(engine, objective, data.train, data.val, start, identity)


if __name__ == "__main__":
    run_stage(main, SFTConfig)
