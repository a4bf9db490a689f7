"""robust_ft: finetune pretrained language models without losing what they could already do."""
