# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""The documents against the code, and against each other."""

import ast
import re

from conftest import PLUGIN, ROOT

TELLS = {
    "ExportError",
    "NoPermission",
    "ValueError",
    "ModuleNotFoundError",
    "ConnectionShutdown",
    "log_error",
    "tell_once",
}


def wording(node):
    """The text of an expression, with … for what is only known when the program runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(wording, values))
        case ast.BinOp(left=left, right=right):
            return wording(left) + wording(right)
        case ast.IfExp(body=body):
            return wording(body)
    return "…"


def messages():
    """Everything that the plugin may tell a user."""
    found = set()
    for node in ast.walk(ast.parse(PLUGIN.read_text())):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[told, *_]):
                if name in TELLS:
                    found.add(wording(told))
            case ast.Assign(targets=[ast.Name(id="reason" | "report")], value=value):
                found.add(wording(value))
            case ast.Return(value=value) if value and "not found" in wording(value):
                found.add(wording(value))
            case ast.Dict(keys=[ast.Attribute(attr="ENOTSUP"), *_], values=values):
                found |= set(map(wording, values))
    return {text for text in found if re.search("[a-z]{4}", text)}


def test_troubleshooting_knows_every_message_and_no_other():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    explained = {
        re.sub(r"\s+", " ", message) if "  " not in message else message
        for bullet in re.findall(r"^- ((?:`[^`]+`(?:,(?: with one of)?\s*)?)+):", text, re.M)
        for message in re.findall("`([^`]+)`", bullet)
    }
    assert messages() - explained == set()
    assert explained - messages() == set()


def test_links_between_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if target.startswith("http"):
                continue
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), f"{path.name}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
                anchors = [
                    re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings
                ]
                assert heading in anchors, f"{path.name}: {target}"
