"""The clients of Python, each as its users write it."""
import asyncio
import dataclasses
import struct

import grpc
import huggingface_hub.errors
import openai
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

WRONG = "no-such-key"


@dataclasses.dataclass
class Case:
    url: str
    grpc: str
    key: str
    name: str
    texts: list
    expected: list
    phase: str

    def same(self, got):
        """Whether these are the vectors of all texts, bit for bit in 32-bit floats."""
        narrow = lambda rows: [struct.pack(f"<{len(row)}f", *row) for row in rows]
        assert narrow(got) == narrow(self.expected), f"{got}\nis not\n{self.expected}"


def raises(kind, call, status=None, says=""):
    """Whether `call` raises exactly this type, with this status and these words."""
    try:
        got = call()
    except Exception as error:  # noqa: BLE001: whatever it is, it is told
        code = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
        assert type(error) is kind and (status is None or code == status) and says in str(error), f"{type(error)} {code}: {error}"
        return error
    raise AssertionError(f"{kind} is not raised; the answer is {got!r}")


def openai_python(case):
    client = lambda key=case.key: openai.OpenAI(base_url=f"{case.url}/v1", api_key=key, max_retries=0)
    embed = lambda input=case.texts, model=case.name, key=case.key, **more: client(key).embeddings.create(input=input, model=model, **more)
    if case.phase == "overload":
        raises(openai.RateLimitError, embed, 429, "under way")
    elif case.phase == "stopping":
        raises(openai.InternalServerError, embed, 503, "shutting down")
    else:
        # base64, which the client asks for and decodes; and lists.
        for more in ({}, {"encoding_format": "float"}):
            answer = embed(**more)
            case.same([entry.embedding for entry in answer.data])
        assert answer.usage.prompt_tokens > len(case.texts) and answer.model == case.name
        case.same([embed(input=text).data[0].embedding for text in case.texts])
        assert len(embed(dimensions=3).data[0].embedding) == 3
        assert [model.id for model in client().models.list()] == [case.name]
        raises(openai.AuthenticationError, lambda: embed(key=WRONG), 401, "a key is needed")
        raises(openai.NotFoundError, lambda: embed(model="nosuch"), 404, "`nosuch` does not exist")
        error = raises(openai.BadRequestError, lambda: embed(input=[]), 400, "cannot be empty")
        assert (error.type, error.code, error.param) == ("invalid_request_error", "empty_input", "input"), error.__dict__
        raises(openai.UnprocessableEntityError, lambda: embed(input=["a"] * 33), 422, "batch size 33")
        raises(openai.UnprocessableEntityError, lambda: embed(dimensions=10_000), 422, "`dimensions`")
        raises(openai.APIStatusError, lambda: embed(input="a" * 2_000_001), 413, "2000000 bytes")
        asyncio.run(openai_asynchronous(case))


async def openai_asynchronous(case):
    async with openai.AsyncOpenAI(base_url=f"{case.url}/v1", api_key=case.key, max_retries=0) as client:
        answers = await asyncio.gather(*(client.embeddings.create(input=text, model=case.name) for text in case.texts * 4))
        case.same([answer.data[0].embedding for answer in answers[: len(case.texts)]])


def langchain_openai(case):
    # Else it sends ids of OpenAI's own tokenizer.
    make = lambda key=case.key: OpenAIEmbeddings(
        model=case.name, base_url=f"{case.url}/v1", api_key=key, check_embedding_ctx_length=False, max_retries=0)
    if case.phase == "overload":
        raises(openai.RateLimitError, lambda: make().embed_query("a"), 429)
    elif case.phase == "stopping":
        raises(openai.InternalServerError, lambda: make().embed_query("a"), 503)
    else:
        case.same(make().embed_documents(case.texts))
        case.same([make().embed_query(text) for text in case.texts])
        case.same(asyncio.run(make().aembed_documents(case.texts)))
        raises(openai.AuthenticationError, lambda: make(WRONG).embed_query("a"), 401)
        raises(openai.BadRequestError, lambda: make().embed_query(""), 400)


def hub_client(case, path="", key=None):
    return huggingface_hub.InferenceClient(model=case.url + path, token=key or case.key)


def hub_inference(case):
    kind = huggingface_hub.errors.HfHubHTTPError
    embed = lambda text="a", **more: hub_client(case).feature_extraction(text, **more)
    if case.phase == "overload":
        raises(kind, embed, 429)
    elif case.phase == "stopping":
        raises(kind, embed, 503)
    else:
        case.same([embed(text)[0] for text in case.texts])
        case.same(embed(case.texts))
        case.same(embed(case.texts, normalize=True, truncate=True, truncation_direction="right"))
        scores = hub_client(case, "/similarity").sentence_similarity(case.texts[0], other_sentences=[case.texts[0], case.texts[1]])
        assert abs(scores[0] - 1) < 1e-5 and scores[1] < 0.999, scores
        raises(kind, lambda: hub_client(case, key=WRONG).feature_extraction("a"), 401)
        raises(huggingface_hub.errors.BadRequestError, lambda: embed(""), 400, "cannot be empty")
        raises(kind, lambda: embed("a", prompt_name="nosuch"), 422, "nosuch")


def langchain_huggingface(case):
    # It takes no address of a server, but any client.
    embeddings = HuggingFaceEndpointEmbeddings(model=case.name, huggingfacehub_api_token=case.key)
    embeddings.client = hub_client(case)
    if case.phase != "answers":
        raises(huggingface_hub.errors.HfHubHTTPError, lambda: embeddings.embed_query("a"), 429 if case.phase == "overload" else 503)
        return
    case.same(embeddings.embed_documents(case.texts))
    case.same([embeddings.embed_query(text) for text in case.texts])
    raises(huggingface_hub.errors.BadRequestError, lambda: embeddings.embed_query(""), 400)


def llama_index(case):
    make = lambda key=case.key: TextEmbeddingsInference(model_name=case.name, base_url=case.url, auth_token=key, text_instruction="", query_instruction="")
    if case.phase == "answers":
        case.same(make().get_text_embedding_batch(case.texts))
        case.same([make().get_query_embedding(text) for text in case.texts])
        case.same(asyncio.run(make().aget_text_embedding_batch(case.texts)))
        raises(KeyError, lambda: make(WRONG).get_query_embedding("a"))
    else:
        # It has no errors of its own: it takes the first row of what is an object.
        raises(KeyError, lambda: make().get_query_embedding("a"))


def haystack(case):
    common = lambda key=case.key: {"api_base_url": f"{case.url}/v1", "api_key": Secret.from_token(key), "model": case.name, "max_retries": 0}
    embed = lambda text="a", key=case.key: OpenAITextEmbedder(**common(key)).run(text)["embedding"]
    if case.phase == "overload":
        raises(openai.RateLimitError, embed, 429)
    elif case.phase == "stopping":
        raises(openai.InternalServerError, embed, 503)
    else:
        case.same([embed(text) for text in case.texts])
        documents = OpenAIDocumentEmbedder(**common(), progress_bar=False).run([Document(content=text) for text in case.texts])["documents"]
        case.same([document.embedding for document in documents])
        raises(openai.AuthenticationError, lambda: embed(key=WRONG), 401)


class Grpc:
    """As grpcurl: the messages are those that the server tells by reflection."""

    def __init__(self, case):
        self.channel = grpc.insecure_channel(case.grpc)
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        self.kind = lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

    def method(self, path, request, response, call="unary_unary"):
        make = getattr(self.channel, call)
        return make(path, request_serializer=lambda message: message.SerializeToString(), response_deserializer=self.kind(response).FromString), self.kind(request)


def grpcio(case):
    client = Grpc(case)
    embed, Embed = client.method("/tei.v1.Embed/Embed", "tei.v1.EmbedRequest", "tei.v1.EmbedResponse")
    stream, _ = client.method("/tei.v1.Embed/EmbedStream", "tei.v1.EmbedRequest", "tei.v1.EmbedResponse", "stream_stream")
    check, Check = client.method("/grpc.health.v1.Health/Check", "grpc.health.v1.HealthCheckRequest", "grpc.health.v1.HealthCheckResponse")
    key = lambda key=case.key: [("authorization", f"Bearer {key}")]

    def fails(code, says, **fields):
        metadata = fields.pop("metadata", key())
        error = None
        try:
            embed(Embed(**fields), metadata=metadata, timeout=60)
        except grpc.RpcError as raised:
            error = raised
        assert error is not None and error.code() == code and says in error.details(), error

    code = grpc.StatusCode
    if case.phase == "overload":
        fails(code.RESOURCE_EXHAUSTED, "under way", inputs="a")
        assert check(Check()).status == 1
    elif case.phase == "stopping":
        fails(code.UNAVAILABLE, "shutting down", inputs="a")
        assert check(Check()).status == 2
    else:
        case.same([embed(Embed(inputs=text), metadata=key()).embeddings for text in case.texts])
        many = case.texts * 50
        answers = [answer.embeddings for answer in stream(iter([Embed(inputs=text) for text in many]), metadata=key())]
        assert len(answers) == len(many)
        case.same(answers[-len(case.texts):])
        info, Info = client.method("/tei.v1.Info/Info", "tei.v1.InfoRequest", "tei.v1.InfoResponse")
        assert info(Info(), metadata=key()).max_client_batch_size == 32
        assert check(Check()).status == 1
        fails(code.UNAUTHENTICATED, "a key is needed", inputs="a", metadata=key(WRONG))
        fails(code.INVALID_ARGUMENT, "cannot be empty", inputs="")
        fails(code.INVALID_ARGUMENT, "more than", inputs="the cat " * 1000)
        fails(code.NOT_FOUND, "nosuch", inputs="a", metadata=[*key(), ("x-model", "nosuch")])
    client.channel.close()


CLIENTS = {"openai": openai_python, "langchain-openai": langchain_openai, "huggingface-hub InferenceClient": hub_inference, "langchain-huggingface": langchain_huggingface,
           "llama-index TextEmbeddingsInference": llama_index, "haystack": haystack, "grpcio": grpcio}
