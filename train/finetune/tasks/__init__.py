"""What an encoder learns to do: a file each, and ``train.finetune.tasks.table`` of them."""
