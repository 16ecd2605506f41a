"""The tour's own parts: what it draws, and how it behaves where nobody plays along."""

import io
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from deployments import demo
from deployments.demo_client import Event, EventFeed, decode_event
from deployments.demo_screen import BAR_WIDTH, WIDTH, Screen, clipped, filled, wrapped

ESCAPES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def draw(out, environment=None):
    """Use every kind of line, with a service's words that try to steer the terminal."""
    screen = Screen(out, environment or {})
    screen.title("1. Title \x1b[31m")
    screen.line("a line\r\x1b[2J")
    screen.say("prose " * 40 + "\x1b]0;owned\x07")
    screen.bar("pod-1", 3, 4, "blocks")
    return out.getvalue()


@pytest.fixture
def nowhere():
    """Yield a loopback port that is bound and does not listen: connections are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def stranger():
    """Yield the URL of a web server that is something else."""

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def feed(nowhere):
    feed = EventFeed(f"tcp://127.0.0.1:{nowhere}")
    yield feed
    feed.close()


# --- drawing ------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_bar_is_empty_or_full_only_where_that_is_true(part, whole):
    """Rounding must not show a hit where there is none, nor hide a block that is missing."""
    cells = filled(part, whole, BAR_WIDTH)
    assert (cells == 0) == (part == 0 or whole == 0)
    assert (cells == BAR_WIDTH) == (0 < whole <= part)
    if 0 < part < whole:
        assert abs(cells - BAR_WIDTH * part / whole) <= 1


def test_a_bar_has_both_numbers_and_its_share_of_cells():
    """The figure is there for whoever cannot see the bar."""
    out = io.StringIO()
    Screen(out, {}).bar("pod-1", 1, 4, "blocks")
    assert out.getvalue().count("█") == BAR_WIDTH // 4
    assert out.getvalue().endswith("░ 1/4 blocks\n")


@given(st.text(max_size=200), st.integers(0, 8))
def test_prose_fits_80_columns_and_loses_no_word(text, indent):
    """Reasons come from the service at any length, with paths that have no blanks."""
    lines = wrapped(text, indent)
    assert all(len(line) <= WIDTH and line.startswith(" " * indent) for line in lines)
    shown = "".join(char if char.isprintable() else " " for char in text)
    assert "".join("".join(lines).split()) == "".join(shown.split())


@given(st.text(max_size=40), st.integers(3, 20))
def test_clipping_keeps_the_width_and_marks_the_cut(text, width):
    """A pod's name of any length must not push its bar off the line."""
    short = clipped(text, width)
    assert len(short) <= width
    assert len(text) <= width or short.endswith("...")


def test_no_escape_codes_in_a_pipe():
    """A file or pager gets text only, whatever words the service answers with."""
    assert not ESCAPES.search(draw(io.StringIO()))


def test_colors_on_a_terminal_are_only_ours():
    """What the service said must not reach the terminal as a command."""
    text = draw(Terminal(), {"TERM": "xterm"})
    assert set(re.findall(r"\x1b[^m]*m", text)) == {"\x1b[1m", "\x1b[32m", "\x1b[0m"}
    assert not ESCAPES.search(re.sub(r"\x1b\[\d+m", "", text))


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_color_gets_none(environment):
    """NO_COLOR is a promise that many tools keep."""
    assert not ESCAPES.search(draw(Terminal(), environment))


def test_an_ascii_stream_gets_ascii():
    """LANG=C must not end the tour with an encoding error."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    screen = Screen(out, {})
    screen.title("Ünïcode")
    screen.bar("pod-1", 1, 2, "blocks")
    assert "#" * (BAR_WIDTH // 2) + "." * (BAR_WIDTH // 2) in raw.getvalue().decode("ascii")


# --- nobody plays along ---------------------------------------------------------------


def test_one_sentence_and_status_1_where_no_service_answers(nowhere, capsys):
    """The most likely first run is one without a service."""
    url = f"http://127.0.0.1:{nowhere}"
    assert demo.main(url, "tcp://127.0.0.1:1") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"kvatlas demo: no service answers at {url}")
    assert "refused" in said
    assert said.count("\n") == 1


def test_a_stranger_at_the_url_is_named(stranger, capsys):
    """Port 8080 is popular: another server there is no kvatlas that is broken."""
    assert demo.main(stranger, "tcp://127.0.0.1:1") == 1
    assert "is not kvatlas" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "http://", "http://x:port", "ftp://x"])
def test_what_is_no_url_is_said_to_be_none(url, capsys):
    """A typing error is not reported as a service that is down."""
    assert demo.main(url, "tcp://127.0.0.1:1") == 1
    assert "is not a URL" in capsys.readouterr().err


# --- published events -----------------------------------------------------------------


def test_a_silent_subscriber_gives_up_within_its_bound(feed):
    """Events are a part of the tour that may be missing."""
    problem = feed.connect(0.05)
    assert problem is not None
    assert feed.endpoint in problem
    assert feed.wait_for("any", 0.01) is None
    assert feed.n_arrived == 0


def test_an_endpoint_that_is_none_is_said_to_be_none():
    """A wrong --events does not end the tour."""
    feed = EventFeed("nonsense")
    try:
        assert "cannot be subscribed to" in (feed.connect(0.05) or "")
    finally:
        feed.close()


def test_the_event_of_a_request_is_found_among_others_and_junk():
    """Other clients' events, and messages of other makes, arrive on the same socket."""
    context = zmq.Context()
    pub = context.socket(zmq.PUB)
    port = pub.bind_to_random_port("tcp://127.0.0.1")
    feed = EventFeed(f"tcp://127.0.0.1:{port}")
    try:
        assert feed.connect(5.0) is None
        event = None
        for seq in range(500):  # until the subscription has reached the publisher
            pub.send_multipart([b"kv.m", b"short", b"\xc1"])
            for request_id in ("other", "mine"):
                body = bytes(
                    msgpack.packb({"request_id": request_id, "pod_scores": {"pod-1": 3}}) or b""
                )
                pub.send_multipart([b"kv.m", seq.to_bytes(8, "big"), body])
            if event := feed.wait_for("mine", 0.02):
                break
        assert event is not None
        assert (event.topic, event.scores) == ("kv.m", {"pod-1": 3})
        assert feed.n_unreadable > 0
    finally:
        feed.close()
        pub.close(linger=0)
        context.destroy(linger=0)


@given(
    st.lists(st.binary(max_size=40), max_size=4)
    | st.binary(max_size=60).map(lambda p: [b"kv.m", b"12345678", p])
)
def test_no_message_breaks_the_reader(frames):
    """Whatever publishes on that port, the tour goes on."""
    assert decode_event(frames) is None


def test_chat_events_carry_their_scores_under_another_name():
    """Both topics are shown alike."""
    body = bytes(msgpack.packb({"request_id": "a", "kv_scores": {"pod-2": 1}}) or b"")
    frames = [b"kv.chat.m", (7).to_bytes(8, "big"), body]
    assert decode_event(frames) == Event("kv.chat.m", 7, "a", {"pod-2": 1})
