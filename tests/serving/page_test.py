"""The chat page in a real browser: text, images, several turns, streaming, stopping, errors."""

import base64
import dataclasses
import json

import pytest

from tests import browser as browser_lib
from tests.serving import examples

pytestmark = [
    pytest.mark.goldens,
    pytest.mark.browser,
    pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING),
]

NASTY = "<script>document.title = 'gone'</script> & <b>\"x\"</b>\n日本 😀"
SAID = "[...document.querySelectorAll('.turn.{} p')].map(e => e.textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_lib.Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser):
    """Starts a server and opens its page."""
    started = []

    def leave():
        browser.open("about:blank")
        browser.wait("document.location.href === 'about:blank'")
        browser.errors.clear()

    def start(engine, **kwargs) -> examples.Server:
        leave()
        started.append(examples.Server(engine, **kwargs))
        browser.open(f"http://127.0.0.1:{started[-1].port}/")
        browser.wait("typeof model !== 'undefined' && model !== null")
        return started[-1]

    yield start
    leave()
    for server in started:
        server.engine.hold.clear()
        server.stop()


def write(browser, text: str) -> None:
    browser.evaluate("document.querySelector('#text').focus()")
    browser.call("Input.insertText", text=text)


def send(browser, text: str) -> None:
    write(browser, text)
    browser.press("Enter", 13)


def attach(browser, *images: bytes) -> None:
    """Gives images to the page as its file dialog does."""
    made = [f"new File([Uint8Array.from(atob('{base64.b64encode(i).decode()}'), c => c.charCodeAt(0))], 'a.png', "
            "{type: 'image/png'})" for i in images]  # fmt: skip
    browser.evaluate(
        f"(() => {{ const files = new DataTransfer(); for (const f of [{', '.join(made)}]) files.items.add(f); "
        "document.querySelector('#file').files = files.files; "
        "document.querySelector('#file').dispatchEvent(new Event('change')); })()"
    )


def said(browser, role: str = "assistant") -> list[str]:
    return browser.evaluate(SAID.format(role))


def message(browser) -> str:
    return browser.evaluate("document.querySelector('#message').textContent")


def test_a_conversation_of_several_turns_and_images(browser, page):
    server = page(examples.saying(NASTY), limits=dataclasses.replace(examples.LIMITS, new_tokens=100))
    assert browser.evaluate("document.querySelector('#model').textContent") == "tiny"
    attach(browser, examples.encoded(0, (30, 20)), examples.encoded(250, (90, 60)))
    browser.wait("pending.length === 2 && document.querySelectorAll('#pending img').length === 2")
    send(browser, "What <i>is</i> this?")
    browser.wait("turns.length === 2 && !running")
    assert said(browser, "user") == ["What <i>is</i> this?"] and said(browser) == [NASTY]
    assert browser.evaluate("document.querySelectorAll('#pending img').length") == 0
    browser.wait("[...document.images].every(i => i.complete && i.naturalWidth)")
    sizes = browser.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[30, 20], [90, 60]]
    send(browser, "And now?")
    browser.wait("turns.length === 4 && !running")
    first, second = server.engine.asked
    assert len(first.prompt.images) == len(second.prompt.images) == 2
    text = examples.tokenizer().decode([t for t in second.prompt.tokens if t >= 0])
    assert text.endswith(f"What <i>is</i> this? ASSISTANT: {NASTY}<|endoftext|>USER: And now? ASSISTANT:")
    assert browser.evaluate("document.title") == "Chat with tiny"
    assert browser.evaluate("document.querySelectorAll('.turn i, .turn b, .turn script').length") == 0
    browser.evaluate("document.querySelector('#new').click()")
    send(browser, "Alone?")
    browser.wait("turns.length === 2 && !running")
    assert len(server.engine.asked[2].prompt.images) == 0
    assert said(browser) == [NASTY]
    assert browser.errors == []


def test_the_answer_is_seen_while_it_comes_and_can_be_stopped(browser, page):
    server = page(examples.saying("one two three four five six", steps=1))
    server.engine.hold.set()
    send(browser, "Count!")
    browser.wait("Boolean(running && document.querySelector('.turn.assistant.waiting'))")
    assert browser.evaluate("document.querySelector('#send').hidden && !document.querySelector('#stop').hidden")
    run, few = server.engine.run, [8]

    def slowly():
        few[0] -= 1
        return run() if few[0] > 0 else []

    server.engine.run = slowly
    server.engine.hold.clear()
    browser.wait("document.querySelector('.turn.assistant p').textContent.startsWith('one')")
    part = browser.wait("document.querySelector('.turn.assistant p').textContent")
    browser.evaluate("document.querySelector('#stop').click()")
    browser.wait("!running")
    assert server.engine.cancelled == [101] or server.wait_for(lambda: server.engine.cancelled == [101]) is None
    assert "(stopped)" in browser.evaluate("document.querySelector('.turn.assistant small').textContent")
    assert part.startswith("one") and "six" not in part
    assert browser.evaluate("turns.length") == 2  # what was said stays, and the conversation goes on
    assert browser.errors == []


def test_enter_sends_and_shift_enter_does_not_and_empty_messages_are_not_sent(browser, page):
    server = page(examples.saying("yes"))
    browser.press("Enter", 13)
    assert browser.evaluate("document.querySelector('#send').disabled")
    write(browser, "a")
    browser.press("Enter", 13, modifiers=8)
    write(browser, "b")
    assert browser.evaluate("turns.length") == 0
    browser.evaluate("document.querySelector('#send').click()")
    browser.wait("turns.length === 2")
    assert len(server.engine.asked) == 1


def test_settings_of_the_page_are_sent(browser, page):
    server = page(examples.saying("a b c d e f g"))
    send(browser, "Hi")
    browser.wait("turns.length === 2 && !running")
    for name, value in (("temperature", "0.5"), ("longest", "2")):
        browser.evaluate(f"document.querySelector('#{name}').value = '{value}'")
    send(browser, "Hi")
    browser.wait("turns.length === 4 && !running")
    default, given = (request.generation for request in server.engine.asked)
    assert (default.temperature, given.temperature, given.max_new_tokens) == (0.0, 0.5, 2)
    assert "cut off" in browser.evaluate("[...document.querySelectorAll('.turn.assistant')].pop().textContent")


def test_an_error_is_said_and_the_message_can_be_sent_again(browser, page):
    server = page(examples.saying("fine"))
    attach(browser, b"no image at all")
    browser.wait("pending.length === 1")
    send(browser, "What?")
    browser.wait("document.querySelector('#message').textContent.includes('cannot be decoded')")
    assert said(browser) == said(browser, "user") == []
    assert browser.evaluate("document.querySelector('#text').value") == "What?"
    browser.evaluate("document.querySelector('#pending button').click()")
    browser.evaluate("document.querySelector('#send').click()")
    browser.wait("turns.length === 2 && !running")
    assert said(browser) == ["fine"] and message(browser) == ""
    server.engine.hold.set()
    send(browser, "And?")
    server.wait_for(lambda: len(server.engine.asked) == 2)
    server.stop()
    browser.wait("document.querySelector('#message').textContent.includes('the server stops')")
    browser.evaluate("document.querySelector('#send').click()")
    browser.wait("document.querySelector('#message').textContent.includes('The server does not answer')")
    assert browser.evaluate("turns.length") == 2
    assert browser.evaluate("document.querySelector('#text').value") == "And?"


def test_a_pasted_and_a_dropped_image_are_attached_and_other_files_are_not(browser, page):
    page(examples.saying("yes"))
    image = base64.b64encode(examples.encoded()).decode()
    for i, (kind, where) in enumerate([("paste", "clipboardData"), ("drop", "dataTransfer")], start=1):
        browser.evaluate(
            f"(() => {{ const data = new DataTransfer(); data.items.add(new File([Uint8Array.from(atob('{image}'), "
            f"c => c.charCodeAt(0))], 'a.png', {{type: 'image/png'}})); const event = new Event('{kind}', "
            f"{{bubbles: true, cancelable: true}}); event.{where} = data; "
            "document.querySelector('#text').dispatchEvent(event); })()"
        )
        browser.wait(f"pending.length === {i}")
    browser.evaluate("attach([new File(['x'], 'a.txt', {type: 'text/plain'})])")
    browser.wait("document.querySelector('#message').textContent === 'a.txt is not an image.'")
    assert browser.evaluate("pending.length") == 2
    assert json.loads(browser.evaluate("body()"))["messages"] == []
