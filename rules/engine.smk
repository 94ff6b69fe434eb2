"""From an FT checkpoint to an engine directory.

inputs:
    ft_ckpts/{model}/{storage}/{tp}-gpu
outputs:
    build/networks/{model}/{variant}/{tp}-gpu/rank{rank}    the network of one rank
    build/plans/{model}/{variant}/{tp}-gpu/rank{rank}       the TensorRT plan of one rank
    trt_engines/{model}/{variant}/{tp}-gpu                  all ranks' networks and plans, config.json
steps:
    make_network (a job a rank) -> build_rank (a job a rank) -> collect_engine
"""

from mpt_trt.engines.packages import choose_package

STORAGE_OF_TYPE = {storage_type: storage for storage, storage_type in STORAGES.items()}
LIMITS = ("max_batch_size", "max_input_len", "max_output_len")


def ft_checkpoint_of_variant(wildcards) -> str:
    name = STORAGE_OF_TYPE[variant_of(wildcards).dtype]
    return f"ft_ckpts/{wildcards.model}/{name}/{wildcards.tp}-gpu"


def limit_options(wildcards) -> list[str]:
    """The variant's limits as command-line options."""
    variant = variant_of(wildcards)
    options = [f"--{name}={getattr(variant, name)}" for name in LIMITS]
    return options + ["--gather_all_token_logits"] * variant.gather_all_token_logits


def backend(wildcards) -> str:
    """The package that builds the plan, with `auto` resolved."""
    return checked(choose_package, variant_of(wildcards).backend).module


def backend_version(wildcards) -> str:
    """Recorded with the plan, so that an upgrade of the package builds it again."""
    return checked(choose_package, variant_of(wildcards).backend).version


def compute_capabilities(wildcards) -> tuple[str, ...]:
    return variant_of(wildcards).compute_capabilities


def of_every_rank(stage: str):
    """An input function: the folders of one stage, in the order of ranks."""

    def folders(wildcards) -> list[str]:
        variant_of(wildcards)
        folder = f"build/{stage}/{wildcards.model}/{wildcards.variant}/{wildcards.tp}-gpu"
        return [f"{folder}/rank{rank}" for rank in ranks(wildcards)]

    return folders


rule make_network:
    input:
        intact("build/networks/{model}/{variant}/{tp}-gpu/rank{rank}"),
        ft_checkpoint=ft_checkpoint_of_variant,
    output:
        folder=directory("build/networks/{model}/{variant}/{tp}-gpu/rank{rank}"),
        seal=seal("build/networks/{model}/{variant}/{tp}-gpu/rank{rank}"),
    log:
        "logs/make_network/{model}/{variant}/{tp}-gpu/rank{rank}.log",
    benchmark:
        "logs/make_network/{model}/{variant}/{tp}-gpu/rank{rank}.tsv"
    conda:
        "../envs/base.yaml"
    params:
        code=version_of("make_network.py"),
        limits=limit_options,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python {SCRIPTS:q}/make_network.py \
            --model_dir {input.ft_checkpoint:q} \
            --rank {wildcards.rank} \
            {params.limits:q} \
            --output_dir {output.folder:q}
        python {SCRIPTS:q}/seal.py {output.folder:q}
        """


rule build_rank:
    input:
        intact("build/plans/{model}/{variant}/{tp}-gpu/rank{rank}"),
        network="build/networks/{model}/{variant}/{tp}-gpu/rank{rank}",
    output:
        folder=directory("build/plans/{model}/{variant}/{tp}-gpu/rank{rank}"),
        seal=seal("build/plans/{model}/{variant}/{tp}-gpu/rank{rank}"),
    log:
        "logs/build_rank/{model}/{variant}/{tp}-gpu/rank{rank}.log",
    benchmark:
        "logs/build_rank/{model}/{variant}/{tp}-gpu/rank{rank}.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    params:
        code=version_of("build_rank.py"),
        backend=backend,
        backend_version=backend_version,
        compute_capabilities=compute_capabilities,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python {SCRIPTS:q}/build_rank.py \
            --network_dir {input.network:q} \
            --rank {wildcards.rank} \
            --backend {params.backend} \
            --compute_capabilities {params.compute_capabilities} \
            --output_dir {output.folder:q}
        python {SCRIPTS:q}/seal.py {output.folder:q}
        """


rule collect_engine:
    input:
        intact("trt_engines/{model}/{variant}/{tp}-gpu"),
        networks=of_every_rank("networks"),
        plans=of_every_rank("plans"),
    output:
        folder=directory("trt_engines/{model}/{variant}/{tp}-gpu"),
        seal=seal("trt_engines/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/collect_engine/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/collect_engine/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    params:
        code=version_of("collect_engine.py"),
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python {SCRIPTS:q}/collect_engine.py \
            --network_dirs {input.networks:q} \
            --plan_dirs {input.plans:q} \
            --output_dir {output.folder:q}
        python {SCRIPTS:q}/seal.py {output.folder:q}
        """
