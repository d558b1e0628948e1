"""What the configurations of all families share: every field with its unit or reason."""

from ml_collections import ConfigDict


def parse_arg(arg: str | None, known: tuple[str, ...]) -> str:
    """The argument behind the colon of `--config FILE:ARG`; the first of `known` if none."""
    name = arg or known[0]
    if name not in known:
        raise ValueError(f"configuration argument {name!r} is not one of {', '.join(known)}")
    return name


def defaults() -> ConfigDict:
    """The released recipe where it is known (d-opsd.md 7), a plain choice elsewhere."""
    c = ConfigDict(type_safe=False)  # some fields are a name or a list; settings.check knows

    # The run.
    c.family = "zimage"
    c.method = "dopsd"  # or sft, sft_teacher, offpolicy, pso, dreambooth: docs/methods.md
    c.train = "lora"  # lora: adapters beside the frozen network; full: every parameter of it
    c.seed = 30
    c.steps = 2000  # optimizer steps
    c.batch_size = 4  # images a micro-batch, over all devices
    c.accumulate = 1  # micro-batches an optimizer step; all from one bucket
    c.checkpoint_every = 500  # steps; the LoRA file is written at the same time
    c.keep_checkpoints = 3  # newest ones kept; LoRA files are all kept
    c.nonfinite = "stop"  # a loss or gradient that is not finite: stop, or skip the step
    c.keep_every = 0  # steps; checkpoints at multiples of it are kept for ever; 0: none
    # What a full run delivers; adapters are always written for diffusers and ComfyUI at once.
    c.export = "diffusers"  # a whole model folder; comfyui: the transformer in one file; or both
    c.export_dtype = "bfloat16"  # of the transformer in it: bfloat16, float16, float32
    c.export_weights = "student"  # or teacher: its weights instead, also for adapters
    c.export_every = 0  # steps; only the newest is kept. 0: only at the end
    c.sample_every = 100  # steps between sample grids; 0: only at the start and the end
    c.sample_rows = 4  # rows of the data set shown in the grids

    # The model.
    c.model = (
        ""  # folder in Hugging Face layout, converted checkpoint, hub id owner/name[@revision]
    )
    c.base_dtype = "bfloat16"  # frozen weights: bfloat16, float32, or quantised: int8, nf4, fp8
    c.dtype = "bfloat16"  # type of activations; states, losses and adapters are float32 anyway
    c.attention = "auto"  # xla, cudnn, splash; auto: the best one for the platform
    c.remat = "full"  # none: fastest, dots, full: least memory

    # The method: the student's rollout and its teacher.
    c.grid = "nodes4"  # noise levels of the rollout: a name of the family, or a list
    c.loss = "x0"  # x0: sigma^2, velocity: 1, step: squared step length, or a list of weights
    c.loss_steps = "all"  # steps that are taught: all, random:m, or a list
    c.teacher = ConfigDict(type_safe=False)
    c.teacher.weights = "ema"  # ema, frozen, live
    c.teacher.decay = 0.9999  # a step; kept in float32
    c.teacher.warmup_steps = 0  # steps with warmup_decay instead
    c.teacher.warmup_decay = 0.999
    c.teacher.context = "vlm"  # the target image through the vision-language model; or prompt
    c.teacher.prompt_key = ""  # with context prompt: the key of the captions that it is told
    c.teacher.vlm = ""  # its folder or hub id; "": the folder vlm of the model
    c.teacher.doubled_template = False  # True: the prompt templated twice, as released
    c.teacher.min_pixels = 512 * 512  # area of the image the vision tower sees
    c.teacher.max_pixels = 768 * 768

    # The other methods. Fields that config.method does not use are refused on the command line.
    c.sft = ConfigDict(type_safe=False)  # of sft, sft_teacher and dreambooth
    c.sft.sigma = "logit_normal"  # noise levels: logit_normal, uniform, shifted, nodes (the grid's)
    c.sft.samples = 4  # of them a picture and step; as many as D-OPSD has nodes
    c.offpolicy = ConfigDict(type_safe=False)
    c.offpolicy.states = "teacher"  # its rollouts; targets: noised pictures of the data set
    c.pso = ConfigDict(type_safe=False)
    c.pso.beta = 5.0  # of the logistic loss
    c.pso.kappa = 1.0  # weight of the negative's error in a pair
    c.pso.prior = 0.5  # weight of the negative's own error: keeps what the model draws
    c.pso.negatives = "student"  # drawn by the student of the moment; start: before training
    c.dreambooth = ConfigDict(type_safe=False)
    c.dreambooth.concept_word = "[V]"  # stands for the concept in every caption
    c.dreambooth.class_word = ""  # takes its place in the class prompts, such as dog
    c.dreambooth.weight = 1.0  # of prior preservation

    # The adapters.
    c.lora = ConfigDict(type_safe=False)
    c.lora.rank = 64
    c.lora.alpha = 128.0  # the update is scaled by alpha / rank
    c.lora.targets = "blocks"  # a preset of the family, or a list of patterns
    c.lora.init_from = ""  # a LoRA file to start from

    # The optimizer. Weight decay spares norms, biases and learned tokens.
    c.optimizer = "adamw"  # adafactor: no first moment, the second by rows and columns
    c.moments_dtype = "float32"  # of adamw; bfloat16: half the memory, rounded at random
    c.offload = ""  # kept in host memory between uses: teacher, optimizer, or both
    c.learning_rate = 1e-4
    c.lr_schedule = "constant"  # constant, linear, cosine
    c.warmup_steps = 0
    c.grad_clip = 1.0  # global norm; 0: off
    c.adam_b1 = 0.9
    c.adam_b2 = 0.999
    c.adam_eps = 1e-8
    c.weight_decay = 0.0

    # The data.
    c.data = ConfigDict(type_safe=False)
    c.data.path = ""  # jsonl file, or folder of images with captions
    c.data.root = ""  # further folder in which a jsonl's paths are looked for
    c.data.resolution = 1024  # pixels; the buckets have about this area, squared
    c.data.buckets = ""  # explicit sizes instead, such as "832x1248,1024x1024", or a list
    c.data.prompt_keys = ""  # caption fields to train on; "": all that every row has
    c.data.image_key = ""  # field of a table that names the picture; "": one of the known names
    c.data.caption_key = ""  # field of a table that holds the caption; "": as prompt_keys says
    c.data.caption_extension = ".txt"
    c.data.caption_lines = False  # True: every line of a caption file is an alternative
    c.data.folder_captions = False  # True: the folder's name where there is no caption file
    c.data.folder_repeats = False  # True: pictures of a folder 10_name count ten times
    c.data.trigger = ""  # word that is put for [trigger] in captions
    c.data.prompt_draw = "batch"  # one prompt key for a batch, as released, or "row"
    c.data.max_pixels = 200_000_000  # larger files are refused unread
    c.data.cache = ""  # folder for encoder features; "": in the work directory

    # Devices: sizes of the mesh axes, one of them may be -1 (the rest).
    c.mesh = ConfigDict(type_safe=False)
    c.mesh.data = -1  # copies of the network, each with its own images
    c.mesh.fsdp = 1  # splits images and weights; a layer's weights are gathered when it runs
    c.mesh.context = 1  # splits tokens: for large images, and fewer images than devices
    c.mesh.tensor = 1  # splits heads and hidden units
    return c
