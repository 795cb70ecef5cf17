"""From files and to files. Import from the modules: ``run``, ``search``, ``types``.

``run.embed_files`` embeds inputs into one output and resumes by content, ``run.plan_files`` says
what that would cost, ``search.search`` asks an output a question.
"""
