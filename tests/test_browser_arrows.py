"The view of routing as arrows, in a real browser: it computes what `route` computes, and can be used without a mouse."
from pathlib import Path
import pytest, torch
from capsule_routing.routing import route
from capsule_routing.squash import lengths

js = Path(__file__).resolve().parent.parent/"capsule_routing/js"
LESSON = torch.tensor([[[1., .5], [0., 1.], [.1, 0.]], [[1., .4], [0., -1.], [0., .1]]])

@pytest.fixture
def view(open_page, tmp_path):
    page = tmp_path/"arrows.html"
    page.write_text(f"<html lang='en'><title>Arrows</title><main><div class='capsule-arrows'>{(js/'arrows.svg').read_text()}</div></main>"
                    f"<script type='module'>{(js/'arrows.js').read_text()}</script></html>")
    page = open_page(page.as_uri())
    page.locator(".arrows-buttons").wait_for()
    return page

def shown(page): return torch.tensor([float(o.get_attribute("data-length")) for o in page.locator("[data-length]").all()])
def agrees(page, votes, n): torch.testing.assert_close(shown(page), lengths(route(votes[None], n))[0], atol=2e-6, rtol=0)

def test_steps_are_those_of_route(view):
    for n in range(1, 5):
        agrees(view, LESSON, n)
        view.get_by_role("button", name="Step an iteration").click()

def test_keyboard_and_disagreement(view):
    votes = LESSON.clone()
    tip = view.get_by_role("slider", name="vote of child 1 for parent C")
    tip.focus(); tip.press("ArrowUp"); votes[0, 2] = torch.tensor([.1, .1])
    agrees(view, votes, 1)
    view.get_by_role("button", name="Make them disagree").click(); votes[1, 0] = -votes[0, 0]
    agrees(view, votes, 1)
    view.get_by_role("button", name="Start again").click()
    agrees(view, LESSON, 1)

def test_a_tip_is_dragged(view):
    box = view.get_by_role("slider", name="vote of child 1 for parent A").bounding_box()
    x, y = box["x"]+box["width"]/2, box["y"]+box["height"]/2
    view.mouse.move(x, y); view.mouse.down(); view.mouse.move(x-100, y+80, steps=3); view.mouse.up()
    assert shown(view)[0] < lengths(route(LESSON[None], 1))[0, 0]-.05

def test_the_mistake_averages_logits(view):
    "With the batch-mate's logits the answer is another one"
    for _ in range(2): view.get_by_role("button", name="Step an iteration").click()
    view.get_by_role("button", name="Average over the batch").click()
    mate = torch.tensor([[[.1, 0.], [0., .1], [-.6, .9]], [[0., .1], [.1, 0.], [-.5, 1.]]])
    u = torch.stack([LESSON, mate]); b = torch.zeros(2, 2, 3)
    from capsule_routing.squash import squash
    for _ in range(2):
        v = squash(torch.einsum("bij,bije->bje", b.softmax(-1), u))
        b = (b + torch.einsum("bije,bje->bij", u, v)).mean(0, keepdim=True).expand(2, 2, 3)
    want = lengths(squash(torch.einsum("bij,bije->bje", b.softmax(-1), u)))[0]
    torch.testing.assert_close(shown(view), want, atol=2e-6, rtol=0)
    assert (want - lengths(route(LESSON[None], 3))[0]).abs().max() > .01

def test_the_picture_without_scripts(view, open_page):
    "It shows the first iteration's lengths and three parents"
    still = open_page(view.url, java_script_enabled=False)
    agrees(still, LESSON, 1)
    assert still.locator(".capsule-arrows svg[role=img] text", has_text="length").count() == 3
