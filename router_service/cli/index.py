"""`router-service index`: make an index of documents, add to it, delete from it, search it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from router_service.cli.console import CommandError, errors, out, write_json
from router_service.cli.progress import steps

if TYPE_CHECKING:
    from experts.embedding.index import DocumentIndex

app = typer.Typer(no_args_is_help=True, help="Make and change an index of documents, which POST /v1/search searches.")

Index = Annotated[Path, typer.Argument(help="The index's folder.", resolve_path=True, file_okay=False)]
Model = Annotated[str | None, typer.Option(help="Encoder: a folder or a name on the hub.  [all-MiniLM-L6-v2]")]
MaxTokens = Annotated[int, typer.Option(min=8, help="Longer documents are cut.")]
Pooling = Annotated[str, typer.Option(help="mean or cls: what the encoder was trained with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def add(
    index: Index,
    corpus: Annotated[
        list[Path],
        typer.Option(exists=True, file_okay=False, help="Folder with corpus.jsonl[.gz]: _id, title, text. Repeatable."),
    ],
    model: Model = None,
    max_tokens: MaxTokens = 256,
    pooling: Pooling = "mean",
) -> None:
    """Add the documents of collections to an index; makes it where there is none. A known id is replaced.

    A document's id in the index is COLLECTION/ID. A running service takes changes up by itself.

    Examples:

      router-service index add data/index --corpus corpora/cran --corpus corpora/med
    """
    from pydantic import ValidationError

    from experts.embedding.encoder import EmbedderConfig, EncoderFiles
    from experts.embedding.index import Document, DocumentIndex
    from routers.embedder import shared_embedder
    from training.retriever.corpus import read_corpus
    from training.retriever.train import embed_all

    options = {"max_tokens": max_tokens, "pooling": pooling} | ({"model": model} if model else {})
    try:
        config = EmbedderConfig.model_validate(options)
    except ValidationError as error:
        raise CommandError(f"encoder: {error.errors()[0]['msg']}", status=2) from error
    files, embedder = EncoderFiles.find(config), shared_embedder(config)
    opened = DocumentIndex(index, dimensions=files.dimensions, encoder=files.fingerprint.hex())
    with steps() as on_progress:
        for folder in corpus:
            found = read_corpus(folder)
            documents = [
                Document(f"{found.name}/{i}", text, title)
                for i, title, text in zip(found.ids, found.titles, found.bodies, strict=True)
            ]
            vectors = embed_all(embedder, found.texts, f"embed {found.name}", on_progress)
            opened.add(documents, vectors)
    errors.print(f"{len(opened)} documents in {index}", soft_wrap=True)


@app.command()
def delete(
    index: Index,
    ids: Annotated[list[str] | None, typer.Option("--id", help="A document's id. Repeatable.")] = None,
    collection: Annotated[str | None, typer.Option(help="All documents of this collection.")] = None,
) -> None:
    """Delete documents from an index.

    Examples:

      router-service index delete data/index --id cran/17

      router-service index delete data/index --collection cran
    """
    if not ids and not collection:
        raise CommandError("name documents with --id, or a --collection", status=2)
    opened = _open(index)
    gone = opened.delete([*(ids or []), *(opened.ids(f"{collection}/") if collection else [])])
    errors.print(f"{gone} deleted, {len(opened)} documents left in {index}", soft_wrap=True)


@app.command()
def show(index: Index, as_json: AsJson = False) -> None:
    """Say what an index holds."""
    opened = _open(index)
    counts: dict[str, int] = {}
    for one in opened.ids():
        counts[one.partition("/")[0]] = counts.get(one.partition("/")[0], 0) + 1
    if as_json:
        write_json({"documents": len(opened), "dimensions": opened.dimensions, "collections": counts})
        return
    table = Table("collection", "documents", title=f"{len(opened)} documents, {opened.dimensions} dimensions")
    for name, count in counts.items():
        table.add_row(name, str(count))
    out.print(table)


def _open(index: Path) -> DocumentIndex:
    from experts.embedding.index import DocumentIndex

    return DocumentIndex(index)
