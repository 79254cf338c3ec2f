"""What kohya's names are here, and why some are nothing here."""

BASES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
}
OPTIMIZERS = {
    "adamw": ("adamw", 0.01, ""),
    "adam": ("adamw", 0.01, "AdamW is Adam with weight decay apart"),
    "adamw8bit": ("adamw8bit", 0.01, ""),
    "pagedadamw8bit": ("adamw8bit", 0.01, "without paging"),
    "pagedadamw": ("adamw", 0.01, "without paging"),
    "lion": ("lion", 0.0, ""),
    "lion8bit": ("lion", 0.0, "in 32 bits"),
    "pagedlion8bit": ("lion", 0.0, "in 32 bits"),
    "adafactor": ("adafactor", 0.0, ""),
    "prodigy": ("prodigy", 0.0, ""),
    "dadaptation": ("prodigy", 0.0, "Prodigy is D-Adaptation's successor"),
    "dadaptadam": ("prodigy", 0.0, "Prodigy is D-Adaptation's successor"),
    "dadaptadampreprint": ("prodigy", 0.0, "Prodigy is D-Adaptation's successor"),
    "dadaptlion": ("prodigy", 0.0, "Prodigy is D-Adaptation's successor"),
}
"""`optimizer_type` in lower case -> kind, kohya's weight decay, what is not the same."""
SCHEDULES = {
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "linear": ("linear", ""),
    "cosine": ("cosine", ""),
    "cosine_with_restarts": ("cosine-restarts", ""),
    "polynomial": ("linear", "a polynomial of power 1 is a line"),
    "adafactor": ("constant", "livery gives Adafactor the rate"),
}
ELSEWHERE = {
    "not in a recipe: pictures are given to `livery ingest`": (
        "caption_extension caption_extention class_tokens class_tokens_of_reg dataset_config "
        "dataset_repeats datasets image_dir in_json metadata_file num_repeats reg_data_dir train_data_dir"
    ),
    "not in a recipe: it says where files go": (
        "huggingface_repo_id log_prefix log_tracker_config log_tracker_name log_with logging_dir "
        "metadata_author metadata_description metadata_license metadata_tags metadata_title model_list "
        "no_metadata output_config output_dir output_name pretrained_model_name_or_path resume "
        "save_every_n_epochs save_last_n_epochs save_last_n_epochs_state save_last_n_steps "
        "save_last_n_steps_state save_model_as save_n_epoch_ratio save_precision save_state "
        "save_state_on_train_end train_data_dir train_on_input training_comment use_wandb wandb_api_key "
        "wandb_run_name"
    ),
    "not in a recipe: livery decides it for the machine": (
        "cache_latents cache_latents_to_disk cache_text_encoder_outputs "
        "cache_text_encoder_outputs_to_disk ddp_gradient_as_bucket_view ddp_static_graph ddp_timeout "
        "dynamo_backend dynamo_mode extra_accelerate_launch_args gpu_ids highvram lowram "
        "main_process_port max_data_loader_n_workers mem_eff_attn multi_gpu no_half_vae "
        "num_cpu_threads_per_process num_machines num_processes opt_channels_last "
        "persistent_data_loader_workers sdpa skip_cache_check text_encoder_batch_size torch_compile "
        "vae_batch_size xformers"
    ),
}
REASONS = {key: why for why, keys in ELSEWHERE.items() for key in keys.split()}
NOT_THE_SAME = {
    "huber_c": "loss_type is not huber",
    "huber_schedule": "loss_type is not huber",
    "multires_noise_discount": "multires_noise_iterations is 0",
    "mode_scale": "weighting_scheme is not mode",
    "vae": "livery reads the autoencoder from the base",
    "clip_l": "livery reads the text encoders from the base",
    "clip_g": "livery reads the text encoders from the base",
    "t5xxl": "livery reads the text encoders from the base",
    "clip_skip": "livery reads the layer of the text encoder that the family was trained with",
    "max_token_length": "livery reads as many words as the text encoder has places for",
    "loraplus_lr_ratio": "livery has no LoRA+",
    "scale_weight_norms": "livery does not cap norms",
    "adaptive_noise_scale": "livery's noise offset is the same for every picture",
    "color_aug": "livery never changes colours: they are part of a style",
    "random_crop": "livery cuts in the middle",
    "min_timestep": "livery trains all noise levels",
    "max_timestep": "livery trains all noise levels",
    "enable_wildcard": "a photo may have several captions, one a line",
    "keep_tokens_separator": "livery counts kept tags: captions.keep_tags",
    "caption_dropout_every_n_epochs": "livery drops captions row by row: captions.dropout",
    "stop_text_encoder_training": "livery trains the text encoders to the end",
    "validation_split": "hold pictures out with `livery ingest --validation`",
    "down_lr_weight": "ranks and targets can be set by pattern, rates cannot",
    "mid_lr_weight": "ranks and targets can be set by pattern, rates cannot",
    "up_lr_weight": "ranks and targets can be set by pattern, rates cannot",
    "block_dims": "write them as patterns: ranks",
    "block_alphas": "write them as patterns: alphas",
    "weighted_captions": "livery reads captions as they are",
    "scale_v_pred_loss_like_noise_pred": "one loss.weighting at a time",
    "v_pred_like_loss": "one loss.weighting at a time",
    "network_weights": "livery starts every adapter from zero",
    "blocks_to_swap": "memory.mode 'auto' offloads what does not fit",
}
USUAL = {
    "clip_skip": "1",
    "max_token_length": "75",
    "max_timestep": "1000",
    "prior_loss_weight": "1",
    "lr_scheduler_power": "1",
    "batch_size": "1",
    "gradient_accumulation_steps": "1",
    "unit": "1",
    "lr_scheduler_num_cycles": "1",
    "LyCORIS_preset": "full",
    "factor": "-1",
}
"""Values that mean what livery does anyway."""
