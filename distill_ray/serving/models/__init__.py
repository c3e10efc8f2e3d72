"""Models in this cluster as Serve deployments: vLLM through `ray.serve.llm`, any other engine of ours as it is.

A replica answers `answer(method, body)` with pieces as JSON text: whole responses or chunks as the OpenAI API has them,
or {"error", "status"}. The router parses them (`deployed`) and needs no vLLM for it.
"""
