"""Exercises: every stub fails its checker, every solution passes, and every property can fail."""

import re

import pytest
from execute import BOOK, chapters
from export import ROOT, exercises, imports

from odlkit import check

FIXTURE = ROOT / "tests" / "exercises.md"
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in [*chapters(), FIXTURE]}
ALL = [pytest.param(name, e, id=f"{name}:{e.label}") for name, text in TEXTS.items() for e in exercises(text)]
KNOWN = {e.label: e for e in exercises(TEXTS["tests/exercises.md"])}


def play(text: str, code: str) -> None:
    """Run code as a reader's cell, with the imports of its chapter and nothing else."""
    names: dict = {}
    exec(imports(text), names)
    exec(code, names)


@pytest.mark.parametrize("name, exercise", ALL)
def test_stub_fails_with_a_property_and_solution_passes(name, exercise, capsys):
    with pytest.raises(check.NotYet, match=rf"^{exercise.checker}: [^:]+: not yet\. ") as failure:
        play(TEXTS[name], exercise.stub)
    assert ": runs:" not in str(failure.value), "a stub should run and fail a property"
    assert capsys.readouterr().out == ""
    play(TEXTS[name], exercise.solution)
    assert re.fullmatch(rf"{exercise.checker} passed: .+\n", capsys.readouterr().out)


def test_every_checker_has_an_exercise_and_every_chapter_two():
    checkers = {name for name, value in vars(check).items() if hasattr(value, "__wrapped__")}
    assert checkers == {e.checker for e in KNOWN.values()}
    groups = [name.split("_")[0] for name in checkers]
    assert len(set(groups)) >= 25 and min(groups.count(g) for g in groups) >= 2
    for name in checkers:
        assert re.match(r"``\w+\(.*\)``: ", getattr(check, name).__doc__), f"{name}: the docstring begins with the call"


def test_an_exercise_in_a_chapter_is_the_one_of_the_fixture():
    """One text: a chapter that adopts an exercise changes it here too."""
    for name, text in TEXTS.items():
        for e in exercises(text):
            here = KNOWN[e.label]
            assert (e.stub, e.solution, e.level) == (here.stub, here.solution, here.level), f"{name}: {e.label}"


# label, a piece of the solution, what is put in its place, the property that must then fail
MUTANTS = [
    ("inv-ex-1", "K.A_adjoint(S.A_adjoint(v))", "v", "shape and dtype"),
    ("inv-ex-1", "S.A_adjoint(v))", "S.A_adjoint(v)).double()", "shape and dtype"),
    ("inv-ex-1", "K.A_adjoint(", "K.A(", "adjoint identity"),
    ("inv-ex-1", "K.A_adjoint(", "Kt(", "runs"),
    ("inv-ex-5", "weight * D", "2 * weight * D", "zero gradient"),
    ("inv-ex-5", "D = Gradient()", "return y[:1]", "shape and dtype"),
    ("prox-ex-1", "z / (1 + weight * step)", "None", "shape and dtype"),
    ("prox-ex-1", "z / (1 + weight * step)", "1.5 * z", "firmly non-expansive"),
    ("prox-ex-1", "(1 + weight * step)", "(1 + weight)", "minimiser"),
    ("prox-ex-4", "return worst", "return 1.0", "symmetric maps give 0"),
    ("prox-ex-4", "torch.func.jvp(N, (z,), (d,))[1]", "N(d)", "proximal maps give 0"),
    ("prox-ex-4", "return worst", "return 0.0", "rotations are seen"),
    ("prox-ex-4", "(z,)", "(0 * z,)", "nonlinear maps are seen"),
    ("solvers-ex-1", "problem.lipschitz + 0.08", "problem.lipschitz / 3", "descent"),
    ("solvers-ex-1", "state.x - slope", "state.x - 0 * slope", "keeps moving"),
    ("solvers-ex-1", "0.01 *", "0.02 *", "descent"),
    ("solvers-ex-1", "problem.lipschitz + 0.08", "100 * problem.lipschitz", "minimiser"),
    ("solvers-ex-3", "return u, v, nu", "return u, v[:1], nu", "shape and dtype"),
    ("solvers-ex-3", "nu = nu + u - v", "nu = nu", "copies agree"),
    ("solvers-ex-3", "return u, v, nu", "return u, v, -nu", "rho nu = -grad f(u)"),
    ("solvers-ex-3", "prior(u + nu, 1 / rho)", "prior(u + nu, 2 / rho)", "minimum"),
    ("pnp-ex-1", "prior.prox(v, alpha**2)", "prior.prox(v, alpha**2).float()", "shape and dtype"),
    ("pnp-ex-1", "alpha**2", "1.01 * alpha**2", "equals HQS"),
    ("pnp-ex-2", "return torch.where", "return v[:1] + 0 * torch.where", "keeps a good proposal"),
    ("pnp-ex-2", "v, safe)", "v, safe).float()", "shape and dtype"),
    ("pnp-ex-2", "v, safe)", "safe, safe)", "keeps a good proposal"),
    ("pnp-ex-2", "v, safe)", "v, x)", "falls back"),
    ("pnp-ex-2", "keep.view(-1, 1, 1, 1)", "keep.all()", "judges each image"),
    ("pnp-ex-2", "MonotoneEnergy()(problem, Candidate(x, v, v, 0 * v))", "~(problem.energy(v) > problem.energy(x))",
     "refuses NaN"),
    ("cert-ex-1", "return low", "return 2.5", "not too long"),
    ("cert-ex-1", "return low", "return low / problem.lipschitz", "not too short"),
    ("cert-ex-2", "return bool", "return not bool", "accepts a true run"),
    ("cert-ex-2", "-1e-13 * F[0]", "0", "forgives round-off"),
    ("cert-ex-2", "- kappa * trace", "- 0 * trace", "uses kappa"),
    ("cert-ex-2", "room >= -1e-13 * F[0]", "room[:, 0] >= -1e-13 * F[0, 0]", "sees a raised energy"),
    ("cert-ex-2", "bool((room >= -1e-13 * F[0]).all())", "not (room < -1e-13 * F[0]).any()", "sees NaN"),
    ("cert-ex-2", "(room >= -1e-13 * F[0])", "((room >= -1e-13 * F[0]) | room.isinf())", "sees infinity"),
    ("padnet-ex-1", "return u, v, w - v", "return u[:1], v, w - v", "shape and dtype"),
    ("padnet-ex-1", "v - nu, 1 / rho", "v + nu, 1 / rho", "u is optimal"),
    ("padnet-ex-1", "rho**-0.5", "1 / rho", "calls the network at alpha"),
    ("padnet-ex-1", "w - v", "v - w", "dual is the network's move"),
    ("padnet-ex-1", "w = u + nu", "w = u", "equals odlkit"),
    ("padnet-ex-2", "mu - 1 / (2 * tau) - tolerance > 0", "True", "descent"),
    ("padnet-ex-2", "max(abs(slope), abs(slope + L))", "abs(slope)", "fallback"),
    ("padnet-ex-2", "max(abs(slope), abs(slope + L))", "abs(slope) + L", "not stricter"),
    ("thm-ex-1", "2.0 / w", "1.0 / w", "every move is kept"),
    ("thm-ex-1", "w * (2.0 / w)", "0.0 * w", "orbit 2, 0, 2, 0"),
    ("thm-ex-2", "else general", "else mu / 2 - tolerance", "any prior"),
    ("thm-ex-2", "max(general, mu / 2 - tolerance)", "mu", "convex: proved"),
    ("thm-ex-2", "max(general, mu / 2 - tolerance)", "mu / 2 - tolerance", "convex: best"),
    ("deconv-ex-1", "/ 0.6745", "/ 0.5", "within 15%"),
    ("deconv-ex-1", "return finest.abs().median().item() / 0.6745", "return round(finest.std().item(), 4)", "scales with y"),
    ("deconv-ex-3", "square_items(A.A(x) - y)", "square_items(A.A(x) - y).sum()", "one number an image"),
    ("deconv-ex-3", "y[0].numel()", "y.numel()", "near 1 at the truth"),
    ("deconv-ex-3", "square_items(A.A(x) - y)", "square_items(A.A(x) - y).mean() * torch.ones(2)", "0 for exact data"),
    ("podm-ex-1", "return (x_f", "return None and (x_f", "shape and dtype"),
    ("podm-ex-1", "mu / 2 *", "mu *", "PADNet's error for H = mu I / 2"),
    ("podm-ex-1", "H(x_g - x)", "mu / 2 * (x_g - x)", "subgradient"),
    ("podm-ex-2", "return torch.where", "return None and torch.where", "shape and dtype"),
    ("podm-ex-2", "x_g, back)", "back, back)", "keeps x_G"),
    ("podm-ex-2", "x_g, back)", "x_g, x)", "feeds back"),
    ("podm-ex-2", "kept.view(-1, 1, 1, 1)", "kept.all()", "judges each image"),
    ("podm-ex-2", "norm_items(psi) <= c * norm_items(x_g - x)", "~(norm_items(psi) > c * norm_items(x_g - x))",
     "refuses NaN"),
    ("podm-ex-3", "0.9 / L", "-0.9 / L", "four positive numbers"),
    ("podm-ex-3", "0.4 * mu", "0.6 * mu", "kept stages descend"),
    ("podm-ex-3", "0.9 / L", "1.1 / L", "fed-back stages descend"),
    ("podm-ex-3", "0.4 * mu", "0.2 * mu", "tolerant"),
    ("podm-thm-ex-1", "return (s", "return None and (s", "shape and dtype"),
    ("podm-thm-ex-1", "/ (2 * tau)", "/ (20 * tau)", "bounds the gap"),
    ("podm-thm-ex-1", "/ (2 * tau)", "/ (0.1 * tau)", "not too large"),
    ("sr-ex-1", "return x_a", "return None and x_a", "shape and dtype"),
    ("sr-ex-1", "2 / (2 + mu)", "1 / (1 + mu)", "zero gradient"),
    ("sr-ex-3", "return x", "return None and x", "shape and dtype"),
    ("sr-ex-3", "A.A_adjoint", "0.5 * A.A_adjoint", "the data do not see it"),
    ("sr-ex-3", "return x - A.A_adjoint(A.A(x))", "return 0 * x", "keeps what is hidden"),
    ("gdc-an-ex-1", ".max()", ".mean()", "no image gains more"),
    ("gdc-an-ex-1", "return torch.linalg", "return 3 * torch.linalg", "some image gains as much"),
    ("gdc-an-ex-2", " if low < high else None", "", "says when none works"),
    ("gdc-an-ex-2", "(low, high) if", "(0.9 * low, high) if", "contracts inside"),
    ("gdc-an-ex-2", "(low, high) if", "(1.01 * low, high) if", "not shorter"),
    ("gdc-ex-1", "d(x).sum(), x)[0]", "d(x).sum(), x)[0].float()", "shape and dtype"),
    ("gdc-ex-1", "d(x).sum()", "d(x).mean()", "each picture's own gradient"),
    ("gdc-ex-1", "x.detach().requires_grad_()", "x.requires_grad_()", "its argument is left alone"),
    ("gdc-ex-2", "return G, D", "return G.float(), D", "shape and dtype"),
    ("gdc-ex-2", "x / (s**2 + alpha**2)\n    D", "x / s**2\n    D", "Tweedie's formula"),
    ("gdc-ex-2", "-x / s**2 + x", "-q * x / s**2 + x", "numbers do not matter"),
    ("gdc-ex-2", "-x / s**2 + x / (s**2 + alpha**2)", "-x / s**2", "sum of both"),
    ("gdc-pcm-ex-1", "return torch.where(accepted.view(-1, 1, 1, 1), x_c, x)", "return x_c[:1]", "shape and dtype"),
    ("gdc-pcm-ex-1", "(c / rho) ** 0.5", "1e-6", "short moves are kept"),
    ("gdc-pcm-ex-1", "<= M", "<= M + 1e3", "closed gate"),
    ("gdc-pcm-ex-1", "accepted.view(", "accepted.all().repeat(len(x)).view(", "each picture by itself"),
    ("gdc-pcm-ex-1", "x + clip_to_ball(T(x) - x, (c / rho) ** 0.5)", "T(x)", "bounded step"),
    ("gdc-pcm-ex-2", "(1 / tau - L) / 2", "(1 / tau + L) / 2", "any prior"),
    ("gdc-pcm-ex-2", "return 1 / tau - L / 2 if", "return 1 / tau + L if", "convex: proved"),
    ("gdc-pcm-ex-2", "return 1 / tau - L / 2 if", "return (1 / tau - L) / 2 if", "convex: best"),
    ("one-ex-1", "None if q >= 1 else", "", "says when it never comes"),
    ("one-ex-1", "q**K > tol", "q**K > 2 * tol", "enough"),
    ("one-ex-1", "return None if q >= 1 else K", "return None if q >= 1 else K + 1", "no more than needed"),
    ("one-ex-2", "[[0.0, -1.0], [1.0, 0.0]]", "[0.0, -1.0]", "two by two"),
    ("one-ex-2", "[[0.0, -1.0], [1.0, 0.0]]", "[[1.0, 0.0], [0.0, -1.0]]", "its average converges"),
    ("one-ex-2", "[[0.0, -1.0], [1.0, 0.0]]", "[[0.0, -1.2], [1.2, 0.0]]", "non-expansive"),
    ("one-ex-2", "[[0.0, -1.0], [1.0, 0.0]]", "[[0.0, -0.9], [0.9, 0.0]]", "does not converge"),
    ("hyper-ex-1", "grad(new, w, v)[0]", "grad(new, w, v)[0].float()", "shape and dtype"),
    ("hyper-ex-1", "v = term = b", "v = term = 2 * b", "one term"),
    ("hyper-ex-1", "v = v + term", "v = v + 2 * term", "two terms"),
    ("hyper-ex-1", "grad(new, u, term, retain", "grad(new, u, b, retain",
     "solves the system"),
    ("hyper-ex-2", "return N.T", "return N", "runs"),
    ("hyper-ex-2", "return N.T @", "return None and N.T @", "shape and dtype"),
    ("hyper-ex-2", "(I - M).T", "(I + M).T", "symmetric M"),
    ("hyper-ex-2", "(I - M).T", "I - M", "any M"),
    ("rpodm-ex-1", ".view_as(u)", ".view_as(u).float()", "shape and dtype"),
    ("rpodm-ex-1", "clamped.gather(1, best)", "flat.gather(1, best)", "inside the box"),
    ("rpodm-ex-1", "gain.topk(s, dim=1)", "gain.topk(min(s + 1, 12), dim=1)", "at most s nonzeros"),
    ("rpodm-ex-1", "flat.square() - (flat - clamped).square()", "clamped.abs()", "nearest"),
    ("rpodm-ex-3", "return h / (K.gram(x) + h)", "return (h / (K.gram(x) + h))[:1]", "shape and dtype"),
    ("rpodm-ex-3", "return h / (K.gram(x) + h)", "return 2 * h / (K.gram(x) + h)", "between 0 and 1"),
    ("rpodm-ex-3", "mu / 2", "mu", "mixes to x_F"),
    ("gdc-joint-ex-1", "return back[::-1]", "return back[1:][::-1]", "one more than stages"),
    ("gdc-joint-ex-1", "return back[::-1]", "return [b[:1] for b in back[::-1]]", "shape and dtype"),
    ("gdc-joint-ex-1", "return back[::-1]", "return back", "ends with p"),
    ("gdc-joint-ex-1", "in reversed(maps)", "in maps", "adjoint of the last stage"),
    ("gdc-joint-ex-1", "vjp(T, x)", "vjp(T, x0)", "each at its own picture"),
    ("gdc-joint-ex-2", "k = 2 * a /", "k = (2 * a + rho) /", "1 where rho = 2 sigma^2"),
    ("gdc-joint-ex-2", "return a / (k * (a**2 + sigma**2))", "return 1.0", "least error"),
    ("gdc-tasks-ex-1", "return (2", "return None and (2", "shape and dtype"),
    ("gdc-tasks-ex-1", "(2 * mask + rho)", "(2 + rho)", "unknown pixels keep v"),
    ("gdc-tasks-ex-1", "(2 * mask * y", "(3 * mask * y", "zero gradient"),
    ("gdc-tasks-ex-2", "return 1 -", "return 2 -", "unchanged picture gives 0"),
    ("gdc-tasks-ex-2", "kept**2", "kept", "contrast alone gives 0"),
    ("gdc-tasks-ex-2", "return 1 - left / kept**2", "return 0.0", "flat texture gives 1"),
    ("spc-ex-1", "return (left", "return None and (left", "shape and dtype"),
    ("spc-ex-1", "clamp_max(1.0)", "clamp_max(2.0)", "norm at most 1"),
    ("spc-ex-1", "sigma.clamp_max(1.0)", "torch.ones_like(sigma)", "keeps what fits"),
    ("spc-ex-1", "sigma.clamp_max(1.0)", "(sigma / sigma[0].clamp_min(1.0))", "nearest"),
    ("spc-ex-2", "if joint else 0.0", "if joint else -0.5", "enough in u"),
    ("spc-ex-2", "if joint else 0.0", "if joint else 0.5", "least in u"),
    ("spc-ex-2", "(1.0 if joint", "(0.5 if joint", "enough jointly"),
    ("spc-ex-2", "(1.0 if joint", "(2.0 if joint", "least jointly"),
    ("agg-ex-1", "return mu *", "return None and mu *", "shape and dtype"),
    ("agg-ex-1", "(1 - mu) * v", "mu * v", "mu = 0 is T"),
    ("agg-ex-1", "slope / d", "slope", "the metric"),
    ("agg-ex-1", "(k + 2)", "(k + 1)", "first step s / 2"),
    ("agg-ex-1", "(k + 2)", "2", "fades like 1 / k"),
    ("agg-ex-2", "2 / (gamma * L)", "3 / (gamma * L)", "safe alone"),
    ("agg-ex-2", "2 / (gamma * L)", "1 / (gamma * L)", "largest alone"),
    ("agg-ex-2", "1.0 if", "2 / (gamma * L) + 1 if", "safe after a network"),
    ("agg-ex-2", "1.0 if", "0.5 if", "largest after a network"),
    ("hdec-ex-1", "return rho * (x - f.prox(x, 1 / rho))", "return x[:1]", "shape and dtype"),
    ("hdec-ex-1", "rho * (x - f", "(x - f", "derivative"),
    ("hdec-ex-2", "both / 2 if mean else both", "both", "means"),
    ("hdec-ex-2", "1 + up * inner * down", "up * inner * down", "sums"),
    ("lambda-ex-1", "return -q @", "return q[:1] *", "shape and dtype"),
    ("lambda-ex-1", "return -q", "return q", "sign"),
    ("lambda-ex-1", "return -q", "return -2 * q", "derivative"),
    ("lambda-ex-2", "- gap)", "+ gap)", "proves it"),
    ("lambda-ex-2", "return mu *", "return 0.5 * mu *", "largest"),
    ("hthm-ex-1", ".max()", ".amax(0)", "one number"),
    ("hthm-ex-1", "k**0.25", "k**0.5", "attained"),
    ("gan-ex-1", "return torch.autograd.grad(upper(u, w), w)[0]", "return None", "shape and dtype"),
    ("gan-ex-1", "range(K)", "range(K + 1)", "K = 0"),
    ("gan-ex-1", "u = step(u, w)", "u = step(u, w).detach()", "derivative"),
    ("gan-ex-2", "return torch.tensor(", "return torch.ones(2) + torch.tensor(", "no look ahead"),
    ("gan-ex-2", ".double()", "", "shape and dtype"),
    ("gan-ex-2", "2 * S", "S", "look ahead"),
    ("hthm-ex-1", ").max()", ").max().maximum(residual[0].max())", "begins at 1"),
    ("hthm-ex-1", ").max()", ")[-1].max()", "every step"),
    ("hthm-ex-2", "return mu +", "return 0 * mu +", "proved"),
    ("hthm-ex-2", "return mu + (1 - mu) * (1 - alpha * (1 - rho))", "return 1.0", "best"),
    ("dgu-ex-1", "w.transpose(0, 1)", "w", "shape and dtype"),
    ("dgu-ex-1", ".flip(2, 3)", "", "adjoint identity"),
    ("dgu-ex-2", "return v.sign()", "return 0 if rho else v.sign()", "shape and dtype"),
    ("dgu-ex-2", "rho * weight", "weight", "one limit"),
    ("dgu-ex-2", "rho * weight", "2 * rho * weight", "zero subgradient"),
    ("path-ex-1", ".T @ v", ".T", "shape and dtype"),
    ("path-ex-1", "v @ v.T", "torch.eye(3).double()", "keeps the span"),
    ("path-ex-1", "v @ v.T, v @ g.T", "v[:, :9] @ v[:, :9].T, v[:, :9] @ g[:, :9].T", "orthogonal"),
    ("path-ex-2", "widths[0]", "2 * widths[0]", "without fusion"),
    ("path-ex-2", "widths[n + 1]", "widths[n]", "finest scale"),
    ("path-ex-2", "(height >> n)", "height", "coarser scales"),
    ("dgn-ex-1", "return Jd.norm()", "return 2 * Jd.norm()", "never more"),
    ("dgn-ex-1", "d = torch.func.vjp(T, x)[1](Jd)[0]", "d = Jd", "within a per cent"),
    ("dgn-ex-1", "(x,)", "(0 * x,)", "at x"),
    ("dgn-ex-2", "1), proposal, safe)", "1), proposal, safe)[:1]", "shape and dtype"),
    ("dgn-ex-2", "F(proposal) <= F(safe)", "F(proposal) < -1 + 0 * F(safe)", "keeps a good proposal"),
    ("dgn-ex-2", "F(proposal) <= F(safe)", "F(proposal) < 1e9 + 0 * F(safe)", "never worse than safe"),
    ("dgn-ex-2", "keep.view(-1, 1, 1, 1)", "keep.all()", "each picture by itself"),
    ("dgcs-ex-1", "torch.nn.functional.pixel_shuffle(", "(", "shape and dtype"),
    ("dgcs-ex-1", "phi, y), n)", "phi, y.roll(1, 2)), n)", "stays in its block"),
    ("dgcs-ex-1", "phi, y)", "2 * phi, y)", "adjoint identity"),
    ("dgcs-ex-2", "return q.T", "return q", "shape and dtype"),
    ("dgcs-ex-2", "return q.T", "return 2 * q.T", "orthonormal rows"),
    ("dgcs-ex-2", "qr(phi.T)", "qr(phi.T.flip(0))", "same row space"),
    ("dgcs-ex-2", "solve(r.T, y)", "solve(r, y)", "same measurements"),
    ("search-ex-1", "sorted(set(targets))", "[1, 2]", "one edge a node"),
    ("search-ex-1", "max(edges", "min(edges", "the largest share"),
    ("search-ex-1", "a.softmax(1)", "a.softmax(1).where(a.max() < 9, a)", "shares only"),
    ("search-ex-2", "/ (2 * eps)", "/ (2 * eps) + torch.zeros(2, 1)", "shape and dtype"),
    ("search-ex-2", "return direct -", "return 2 * direct -", "first order at xi = 0"),
    ("search-ex-2", "val, w - xi * slopes(train, w)[0]", "val, w", "second order"),
    ("haze-ex-1", ".amax(1, keepdim=True)", ".amax(1)", "shape and dtype"),
    ("haze-ex-1", "torch.maximum(dark, bright)", "dark", "the scene fits"),
    ("haze-ex-1", "torch.maximum", "1.1 * torch.maximum", "no smaller t does"),
    ("haze-ex-2", ".clamp(min=0)", "", "shape and dtype"),
    ("haze-ex-2", "(1 / w)", "(0.5 / w)", "a bound"),
    ("haze-ex-2", "(1 / w)", "1", "the best one"),
    ("light-ex-1", "O(z)", "O(z).float()", "shape and dtype"),
    ("light-ex-1", "a.softmax(0)", "a.sigmoid()", "shares sum to 1"),
    ("light-ex-1", "a.softmax(0)", "(a / a.sum())", "non-expansive"),
    ("light-ex-1", "a.softmax(0)", "(a / 100).softmax(0)", "a large entry wins"),
    ("light-ex-2", "1 / (w.min()", "3 / (w.min()", "a contraction"),
    ("light-ex-2", "(w.max() - w.min()) /", "w.max() /", "its factor"),
    ("light-ex-2", "1 / (w.min() + w.max())\n    return tau, (w.max() - w.min()) / (w.max() + w.min())",
     "0.5 / w.max()\n    return tau, 1 - 2 * tau * w.min()", "no other step is better"),
    ("blind-ex-1", "(v - c[", "(v.flatten() - c[", "shape and dtype"),
    ("blind-ex-1", ".clamp(min=0)", "", "no negative entry"),
    ("blind-ex-1", "return (v", "return 0.9 * (v", "sum 1"),
    ("blind-ex-1", "(v - c[(falling > c).sum() - 1]).clamp(min=0)", "v.softmax(0) / 7", "nearest"),
    ("blind-ex-2", ".ifft2(k).real", ".ifft2(k)", "shape and dtype"),
    ("blind-ex-2", "G.conj() * Y", "G * Y", "exact without noise"),
    ("blind-ex-2", "2 * mu", "mu", "zero gradient"),
    ("flow-ex-1", "z - 2 * tau * a * slope", "slope", "shape and dtype"),
    ("flow-ex-1", "(1 + 2 * tau", "(1 + tau", "zero gradient"),
    ("flow-ex-2", "z - s * a * slope", "slope", "shape and dtype"),
    ("flow-ex-2", "kappa / (1 + kappa)", "kappa", "zero gradient"),
    ("rain-ex-1", "(q - miss)", "(q - miss)[:1]", "shape and dtype"),
    ("rain-ex-1", ".clamp(min=0)", "", "only light"),
    ("rain-ex-1", "torch.where(dry, (b + t * p) / (1 + t), p - miss)", "p - miss", "u_b is best for its u_r"),
    ("rain-ex-1", "dry = q - miss < 0", "dry, miss = torch.zeros_like(b) == 0, q", "u_r is best"),
    ("rain-ex-2", "(1 + L_b**2)", "1", "a bound"),
    ("rain-ex-2", "(1 + L_b**2)", "(1 + L_b) ** 2", "reached"),
    ("clean-ex-1", "slopes @ torch.linalg.solve(H, b)", "torch.linalg.solve(H, b)", "runs"),
    ("clean-ex-1", "/ len(w)", "* torch.ones(1, 6) / len(w)", "shape and dtype"),
    ("clean-ex-1", "-s * (1 - s)", "s * (1 - s)", "descent"),
    ("clean-ex-1", "-s * (1 - s)", "-s", "derivative"),
    ("clean-ex-2", "2 * c / (1 + c)", "2 * c.sum() / (1 + c.sum())", "shape and dtype"),
    ("clean-ex-2", "2 * c / (1 + c)", "1.9 * c / (1 + c)", "no rule is better"),
    ("clean-ex-2", "2 * c / (1 + c)", "2.1 * c / (1 + c)", "a rule reaches it"),
    ("few-ex-1", ".amax(1)", ".amax(0)", "shape and dtype"),
    ("few-ex-1", "rows.amax(1)", "f.square().sum(2).amax(1)", "a bound"),
    ("few-ex-1", "rows.amax(1)", "rows.sum(1)", "no looser than the row sums"),
    ("few-ex-2", "(gram, Y)", "(gram, Y[..., :1])", "shape and dtype"),
    ("few-ex-2", "+ ridge *", "+ 2 * ridge *", "zero gradient"),
    ("syn-ex-1", ".any(0)", ".any(0).long()", "shape and dtype"),
    ("syn-ex-1", "cheap & good & strictly", "cheap & good & strictly & (seconds < 0)", "nothing beaten is kept"),
    ("syn-ex-1", "cheap & good & strictly", "cheap & good", "nothing else is left out"),
    ("syn-ex-2", "(a - b).mean(),", "(a - b),", "shape and dtype"),
    ("syn-ex-2", "(a - b).std()", "a.std()", "paired"),
    ("syn-ex-2", "+ b.var() / len(b)", "", "separate sets"),
    ("syn-ex-2", "return a.mean() - b.mean()", "return b.mean() - a.mean()", "mean"),
]  # fmt: skip


@pytest.mark.parametrize("label, right, wrong, fails", MUTANTS, ids=[f"{m[0]}:{m[3]}" for m in MUTANTS])
def test_a_wrong_solution_fails_the_property_it_breaks(label, right, wrong, fails):
    solution = KNOWN[label].solution
    assert right in solution
    with pytest.raises(check.NotYet, match=rf"^{KNOWN[label].checker}: {re.escape(fails)}: not yet\. "):
        play(TEXTS["tests/exercises.md"], solution.replace(right, wrong))


def test_every_property_has_a_wrong_solution(capsys):
    """What a checker prints when it passes is what it asked; each of these has a mutant above."""
    for exercise in KNOWN.values():
        play(TEXTS["tests/exercises.md"], exercise.solution)
        asked = set(capsys.readouterr().out.strip().split(" passed: ")[1].split(", ")) - {"0"}
        broken = {part for label, _, _, fails in MUTANTS if label == exercise.label for part in fails.split(", ")}
        assert asked <= broken, f"{exercise.label}: no wrong solution for {asked - broken}"


def test_an_error_inside_the_function_is_named_and_says_what_was_expected():
    message = r"inv_1: runs: not yet\. It raised TypeError: .* Expected ``adjoint\(v, K, S\)``"
    with pytest.raises(check.NotYet, match=message) as e:
        check.inv_1(lambda v: v)
    assert isinstance(e.value, AssertionError) and isinstance(e.value.__cause__, TypeError)
    for unwritten in (lambda *a: None, lambda *a: ..., lambda *a: a[0] * float("nan")):
        with pytest.raises(check.NotYet, match="inv_1: shape and dtype"):
            check.inv_1(unwritten)


def test_nothing_is_left_behind():
    """A checker draws from its own generators: the global one stands where it stood."""
    import torch

    before = torch.get_rng_state()
    play(TEXTS["tests/exercises.md"], KNOWN["prox-ex-1"].solution)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.replace("```python\n", "```text\n", 1), "inv-ex-1: .* stub"),
        (lambda t: t.replace("{solution-start} inv-ex-1", "{solution-start} inv-ex-9"), "inv-ex-1: .* solution"),
        (lambda t: t.replace("check.inv_1(", "check.inv_2(", 1), "inv-ex-1: the stub does not call check.inv_1"),
    ],
)
def test_an_incomplete_exercise_is_reported(change, message):
    with pytest.raises(ValueError, match=message):
        exercises(change(TEXTS["tests/exercises.md"]))


def test_chapters_were_looked_at():
    assert {BOOK / "foundations" / "inverse-problems.md", BOOK / "padnet" / "theorems.md"} <= {ROOT / name for name in TEXTS}
