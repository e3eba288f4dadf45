"""Routes beside generation: models, health, metrics, tokens, facts about the server.

They read what the engine's thread has laid down and never touch the engine, and they tokenise on a thread of
their own: whoever floods them slows nobody's answer.
"""

from __future__ import annotations

from aiohttp import web

from engine.server import exposition, faults, openapi, protocol, tokens
from engine.server.facts import facts
from engine.server.replies import ModelList, StatusReply, VersionReply
from engine.server.state import STATE
from engine.server.version import version

routes = web.RouteTableDef()


@routes.get("/v1/models")
async def list_models(request: web.Request) -> web.Response:
    return faults.json_response(ModelList(request.app[STATE].alive().cards()))


@routes.get("/v1/models/{id:.+}")
async def show_model(request: web.Request) -> web.Response:
    serving = request.app[STATE].alive()
    name = serving.check_model(request.match_info["id"])
    return faults.json_response(next(card for card in serving.cards() if card.id == name))


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    """503 while the model loads and once the engine is dead or stuck; 200 otherwise, draining too."""
    request.app[STATE].alive()
    return faults.json_response(StatusReply("ok"))


@routes.get("/ready")
async def ready(request: web.Request) -> web.Response:
    """200 if a request sent now would be taken."""
    request.app[STATE].ready()
    return faults.json_response(StatusReply("ready"))


@routes.get("/version")
async def show_version(request: web.Request) -> web.Response:
    return faults.json_response(VersionReply(version()))


@routes.get("/metrics")
async def metrics(request: web.Request) -> web.Response:
    """Also of an engine that is dead."""
    serving = request.app[STATE].loaded()
    text = exposition.render(serving.runner, serving.names[0])
    return web.Response(body=text, headers={"Content-Type": exposition.CONTENT_TYPE})


@routes.get("/openapi.json")
async def describe_api(request: web.Request) -> web.Response:
    return faults.json_response(openapi.document(version()))


@routes.get("/server_info")
async def server_info(request: web.Request) -> web.Response:
    state = request.app[STATE]
    return faults.json_response(facts(state.loaded(), state.options))


@routes.post("/tokenize")
async def tokenize(request: web.Request) -> web.Response:
    serving = request.app[STATE].alive()
    async with request.app[STATE].bodies.json(request) as body:
        call = protocol.decode(body, tokens.TokenizeRequest)
        serving.check_model(call.model)
        return faults.json_response(await serving.beside(lambda: tokens.tokenize(serving.preparer, call)))


@routes.post("/detokenize")
async def detokenize(request: web.Request) -> web.Response:
    serving = request.app[STATE].alive()
    async with request.app[STATE].bodies.json(request) as body:
        call = protocol.decode(body, tokens.DetokenizeRequest)
        serving.check_model(call.model)
        return faults.json_response(await serving.beside(lambda: tokens.detokenize(serving.preparer, call)))
