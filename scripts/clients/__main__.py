#!/usr/bin/env python3
"""Runs the clients that people have against `trt-embed serve` on loopback: their vectors are those of `trt-embed embed`, their errors their own types.

    python3 -m venv VENV && VENV/bin/pip install --no-deps -r scripts/clients/requirements.txt
    npm ci --prefix scripts/clients
    VENV/bin/python scripts/clients --binary target/debug/trt-embed --model tests/fixtures/bert

The clients of Python are in python_clients.py, those of Node in node_clients.mjs; without --node these are left out.
Fails for the first client that gives another vector or raises another error.
"""
import argparse
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import python_clients
from python_clients import Case

HERE = pathlib.Path(__file__).resolve().parent
KEY, NAME = "key-of-clients", "served"
TEXTS = ["the cat sat on the mat", "Stocks fell.", "a red dog, a blue dog", "Ünïcode 😀 and more"]


class Server:
    """`trt-embed serve` on free ports; killed at the end of the context."""

    def __init__(self, binary, model, *flags):
        command = [binary, "serve", "--model", f"{NAME}={model}", "--backend", "cpu", "--batch-size", "1", "--hostname", "127.0.0.1", "--port", "0",
                   "--grpc-port", "0", "--api-key", KEY, *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "info"})
        self.said, ports = [], {}
        for line in self.process.stderr:
            self.said.append(line)
            for kind in ("http", "grpc"):
                if f"listening on {kind}://127.0.0.1:" in line:
                    ports[kind] = int(line.split("127.0.0.1:")[1].split()[0])
            if "ready" in line:
                break
        else:
            sys.exit("the server did not become ready:\n" + "".join(self.said))
        self.url, self.grpc, self.port = f"http://127.0.0.1:{ports['http']}", f"127.0.0.1:{ports['grpc']}", ports["http"]
        # What it says must be read, else it waits for its reader.
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def occupied(self):
        """One request is under way: its body is never sent."""
        head = f"POST /embed HTTP/1.1\r\nhost: a\r\nauthorization: {KEY}\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode())
            self.until("trt_embed_active_requests 1")
            yield

    def metrics(self):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def until(self, part):
        end = time.monotonic() + 60
        while part not in self.metrics():
            if time.monotonic() > end:
                sys.exit(f"the server never told {part}")


def vectors(binary, model):
    command = [binary, "embed", "-m", model, "--backend", "cpu", "--batch-size", "1", "--normalize", "on", "--format", "jsonl", *TEXTS]
    rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(row)["embedding"] for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--node", action="store_true", help="run the clients of Node, too")
    args = parser.parse_args()
    expected = vectors(args.binary, args.model)

    def run(phase, server):
        case = Case(server.url, server.grpc, KEY, NAME, TEXTS, expected, phase)
        for name, client in python_clients.CLIENTS.items():
            client(case)
            print(f"{phase:10} {name}", flush=True)
        if args.node:
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(case.__dict__, file)
                file.flush()
                subprocess.run(["node", str(HERE / "node_clients.mjs"), file.name], check=True)

    with Server(args.binary, args.model) as server:
        run("answers", server)
    # Half a request holds the only place; and what is told to stop waits for it.
    with Server(args.binary, args.model, "--max-concurrent-requests", "1", "--body-timeout", "600", "--shutdown-timeout", "600") as server, server.occupied():
        run("overload", server)
        server.process.send_signal(signal.SIGTERM)
        while not any("stopping" in line for line in server.said):
            time.sleep(0.01)
        run("stopping", server)


if __name__ == "__main__":
    main()
