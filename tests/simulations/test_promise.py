from fedssl_simulations.promise import promise

PLAN = {"unit": "user", "neighbours": "add/remove one user", "trust": "central", "accountant": "PLD", "delta": 1e-6, "epsilon": 2.0}
PLAN |= {"noise_multiplier": {"counts": 0.9, "update": 1.5}, "clip_norm": {"counts": 1.0, "update": 1.0}, "sampling": {"training": "Poisson, rate 0.08"}}


def test_without_a_plan_it_says_plainly_that_nothing_is_promised_and_what_the_server_sees():
    said = promise({}, {"privacy": {"noise_multiplier": 0.0, "delta": 1e-6}, "counts": {"lags": 3}})
    assert (said.has_plan, said.title) == (False, "No differential privacy is promised")
    assert any("honest but curious) sees each user's exact update" in sentence for sentence in said.sentences)
    assert any("counts that a user sends" in sentence for sentence in said.sentences)
    assert not any("counts" in sentence for sentence in promise({}, {}).sentences)


def test_a_clip_without_noise_promises_nothing():
    said = promise({"clip_norm": 1.0, "noise_multiplier": 0.0}, {})
    assert not said.has_plan
    assert ("Clip norm", "1") in said.facts


def test_a_plan_is_told_with_its_factor_and_all_its_terms():
    said = promise(PLAN, {})
    assert said.has_plan
    assert "at most a factor of e^2 (about 7.4), except with probability 1e-6" in said.sentences[0]
    assert "differ by having or not having one user" in " ".join(said.sentences)
    facts = dict(said.facts)
    assert facts["Noise / clip norm"] == "counts: 0.9; update: 1.5"
    assert facts["Sampling"] == "training: Poisson, rate 0.08"
    assert (facts["Epsilon"], facts["Delta"], facts["Trust"], facts["Accountant"], facts["Unit"]) == ("2", "1e-6", "central", "PLD", "user")


def test_the_plans_own_caveats_are_repeated():
    assert "Only in the dark." in promise({**PLAN, "caveats": ["Only in the dark."]}, {}).sentences


def test_a_statement_without_caveats_gets_those_of_its_settings():
    said = " ".join(promise(PLAN, {"server": {"sampling": "poisson"}, "data": {"catalogue": ""}}).sentences)
    assert "not against the server or the network" in said
    assert "outside epsilon" in said
    assert "outside epsilon" not in " ".join(promise(PLAN, {"data": {"catalogue": "public.jsonl"}}).sentences)


def test_a_large_epsilon_is_called_no_guarantee():
    assert any("no guarantee in practice" in sentence for sentence in promise({**PLAN, "epsilon": 284.0}, {}).sentences)
    assert not any("no guarantee in practice" in sentence for sentence in promise(PLAN, {}).sentences)


def test_settings_that_ask_for_a_plan_speak_until_a_report_does():
    said = promise({}, {"privacy": {"epsilon": 8.0, "delta": 1e-6, "clip_norm": 1.0}})
    assert said.title == "Differential privacy for each user: ε = 8"
