"""`router-service train retriever`: adapters on an encoder, one a domain, and the pilots that route between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from router_service.cli.console import CommandError, errors, out, write_json
from router_service.cli.job import Address, Submit, Wait, WorkingDir, run_as_job, train_command
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from training.retriever.train import RetrieverManifest, RetrieverSpec


def train_retriever(
    corpus: Annotated[
        list[Path],
        typer.Option(
            exists=True, file_okay=False, resolve_path=True, help="A domain's folder, as BEIR has it. Repeatable."
        ),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", resolve_path=True, help="Folder that the retriever goes to; never overwritten.")
    ],
    start: Annotated[
        Path | None,
        typer.Option("--from", exists=True, file_okay=False, resolve_path=True, help="Take known domains from there."),
    ] = None,
    base: Annotated[str, typer.Option(help="The encoder's name as an expert; adapters are BASE-DOMAIN.")] = "search",
    aggregation: Annotated[str, typer.Option(help="Of similarities to pilots: mean, max or softmax.")] = "mean",
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="YAML: `encoder`, `adapter`, `most_pairs`, `pilot_queries`."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides all that is random.")] = 0,
    submit: Submit = False,
    address: Address = None,
    wait: Wait = True,
    working_dir: WorkingDir = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run; else it is thrown away.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Train an embedding expert for each domain, and the router between them.

    Trains on qrels/train.tsv where a corpus has it, else on sentences and the rest of their document; judged test
    queries are never read. OUT holds a fleet file and a policy that serve it. With --from, domains may be added or left
    out without training the others again.

    Examples:

      router-service train retriever --corpus corpora/cran --corpus corpora/med --out retriever-1

      router-service train retriever --corpus corpora/cran --corpus corpora/npl --from retriever-1 --out retriever-2
    """
    from pydantic import ValidationError

    from training.retriever.train import RetrieverManifest, RetrieverSpec

    try:
        spec = RetrieverSpec.model_validate(
            {
                **(_read(config) if config else {}),
                "corpora": tuple(corpus),
                "out": out_folder,
                "start": start,
                "base": base,
                "aggregation": aggregation,
                "seed": seed,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise CommandError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", status=2) from error
    if not submit:
        _say(_here(spec, resume), spec.out, as_json)
        return
    run_as_job(_command(spec, config, resume), out_folder=spec.out, address=address, working_dir=working_dir, wait=wait)
    if wait:
        _say(RetrieverManifest.read(spec.out), spec.out, as_json)


def _here(spec: RetrieverSpec, resume: bool) -> RetrieverManifest:
    from training.retriever.train import train_retriever as run

    with steps() as on_progress:
        return run(spec, resume=resume, on_progress=on_progress)


def _command(spec: RetrieverSpec, config: Path | None, resume: bool) -> list[str]:
    """The same run, as a command for the cluster."""
    command = train_command("retriever")
    for folder in spec.corpora:
        command += ["--corpus", str(folder)]
    command += [
        "--out",
        str(spec.out),
        "--base",
        spec.base,
        "--aggregation",
        spec.aggregation,
        "--seed",
        str(spec.seed),
    ]
    command += ["--from", str(spec.start)] if spec.start else []
    command += ["--config", str(config.resolve())] if config else []
    return command if resume else [*command, "--no-resume"]


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"cannot read {path}: {error}", status=2) from error
    if not isinstance(options, dict):
        raise CommandError(f"{path} must hold options as a mapping, not {type(options).__name__}", status=2)
    return options


def _say(manifest: RetrieverManifest, folder: Path, as_json: bool) -> None:
    if as_json:
        write_json(manifest.model_dump(mode="json"))
        return
    table = Table("domain", "documents", "pairs", "scale", "held-out nDCG@10", "of the base")
    for name, domain in manifest.domains.items():
        measured = domain.held_out_ndcg
        kept, base = measured[f"{domain.scale:g}"], measured["0"]
        counts = (str(domain.documents), str(domain.train_pairs))
        table.add_row(name, *counts, f"{domain.scale:g}", f"{kept:.3f}", f"{base:.3f}")
    out.print(table)
    files = f"--fleet {folder / 'fleet.yaml'} --policies {folder / 'policies'}"
    errors.print(f"serve it: router-service serve {files}", soft_wrap=True)
