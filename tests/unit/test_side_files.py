"""An exported model keeps the files that its base came with."""

from latent_grpo.learner.base_rank import copy_side_files

KEPT = {
    "LICENSE": "Apache",
    "LICENSE.txt": "Apache",
    "README.md": "# A model",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
OTHERS = ("config.json", "model.safetensors", "optimizer.pt", "latent_chain.json")


def test_tokenizer_templates_licence_and_card_are_copied_and_nothing_else(tmp_path):
    source, folder = tmp_path / "base", tmp_path / "model"
    for name in (*KEPT, *OTHERS):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(KEPT.get(name, "of the base"))
    folder.mkdir()
    for _ in range(2):  # a second export into the same folder
        copy_side_files(source, folder)
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == KEPT
