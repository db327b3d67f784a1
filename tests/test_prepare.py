"A photograph of a digit: found, prepared and named; what holds no digit is said to hold none."
import json
import numpy as np,pytest,torch
from PIL import Image
from capsule_routing.commands import capsule_explore,capsule_predict,run_verb
from capsule_routing.glyphs import make_glyphs
from capsule_routing.photographs import STYLES,photograph
from capsule_routing.prepare import digits,fit_digit,is_fitted
from capsule_routing.pretrained import pretrained_net
from capsule_routing.tasks import predict

@pytest.fixture(scope='module')
def glyphs(): return make_glyphs(40, 7)
@pytest.fixture(scope='module')
def net(): return pretrained_net()
def grey(a): return np.asarray(Image.fromarray(a).convert('L'))

def centre(a): return [(a.sum(1-k)*(np.arange(28)+.5)).sum()/a.sum() for k in (0, 1)]

@pytest.mark.parametrize('h,w', [(40, 40), (100, 10), (5, 5), (3, 90)])
def test_fit_digit_fills_twenty_and_centres_the_mass(h, w):
    ink = np.zeros((h+9, w+9))
    ink[4:4+h,5:5+w] = .5
    a = fit_digit(ink)
    ys,xs = np.nonzero(a)
    assert a.dtype==np.uint8 and a.max()==255 and max(np.ptp(ys), np.ptp(xs))==19
    assert (np.ptp(ys)+1, np.ptp(xs)+1)==tuple(max(1, int(20*n/max(h, w)+.5)) for n in (h, w))
    assert all(abs(c-14)<=.5 for c in centre(a.astype(float)))

def test_fit_digit_clamps_at_the_border():
    ink = np.zeros((20, 20)); ink[:,0] = .02; ink[:,19] = 1          # nearly all the mass at the right
    a = fit_digit(ink)
    assert a.shape==(28, 28) and np.flatnonzero(a.any(0)).min()==0

@pytest.mark.parametrize('style', STYLES)
def test_a_photograph_is_read(style, glyphs, net):
    found = digits(grey(photograph(glyphs.x[:1,0].numpy(), style, 2)))
    assert len(found)==1
    assert predict(net, torch.from_numpy(found[0].picture)[None,None]).lengths.argmax()==glyphs.y[0]

def test_light_on_dark_is_found(glyphs):
    photo = grey(photograph(glyphs.x[:1,0].numpy(), 'plain', 2))
    a,b = digits(photo),digits(255-photo)
    assert a[0].box==b[0].box and abs(a[0].picture.astype(int)-b[0].picture).mean()<5

@pytest.mark.parametrize('kind', ['empty', 'black', 'white', 'noise', 'gradient'])
@pytest.mark.parametrize('shape', [(300, 400), (1, 1), (2, 90), (28, 28)])
def test_nothing_is_found_where_nothing_is(kind, shape):
    if kind=='noise' and shape==(28, 28): return      # the network says it of that, below
    rng = np.random.default_rng(0)
    a = dict(empty=np.full(shape, 210), black=np.zeros(shape), white=np.full(shape, 255), noise=rng.integers(0, 256, shape),
             gradient=np.linspace(90, 200, shape[1])*np.ones(shape))[kind]
    assert digits(a.astype(np.uint8))==[]

def test_predict_reads_a_row_without_a_run(tmp_path, glyphs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph(glyphs.x[:3,0].numpy(), 'lined', 4)).save('photo.jpg')
    assert run_verb(capsule_predict, ['photo.jpg', '--json', '--out', 'p.svg', '--couplings'])==0
    got = json.loads(capsys.readouterr().out)
    assert len(got['predictions'])==3 and [p['box'][0] for p in got['predictions']]==sorted(p['box'][0] for p in got['predictions'])
    assert got['picture']=='p.svg' and '<svg' in (tmp_path/'p.svg').read_text() and (tmp_path/'p-couplings.svg').exists()
    assert run_verb(capsule_predict, ['mnist', 'photo.jpg', '--json'])==0           # the old spelling
    assert json.loads(capsys.readouterr().out)['predictions']==got['predictions']
    assert run_verb(capsule_predict, ['photo.jpg', 'photo.jpg', '--prepare', 'none', '--json'])==0
    assert len(json.loads(capsys.readouterr().out)['predictions'])==2

def test_no_class_is_said_in_words(tmp_path, capsys):
    Image.new('L', (200, 200), 220).save(tmp_path/'x.png')
    Image.new('L', (28, 28)).save(tmp_path/'black.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)).save(tmp_path/'noise.png')
    args = [tmp_path/'x.png', tmp_path/'black.png', tmp_path/'noise.png', '--out', tmp_path/'p.png']
    assert run_verb(capsule_predict, args)==0
    assert capsys.readouterr().out.count('no class is there (longest 0.')==3
    assert run_verb(capsule_predict, [*args, '--json'])==0
    assert [p['class'] for p in json.loads(capsys.readouterr().out)['predictions']]==[None]*3

def test_what_is_as_mnist_already_is_not_touched(glyphs, tmp_path):
    from capsule_routing.reading import see
    Image.fromarray(glyphs.x[0,0].numpy()).save(tmp_path/'x.png')
    assert is_fitted(glyphs.x[0,0].numpy())
    assert torch.equal(see([tmp_path/'x.png'], (1, 28, 28), True)[0].x, glyphs.x[0])

def test_the_sweep_of_a_dimension(tmp_path, capsys):
    assert run_verb(capsule_explore, ['--gif', tmp_path/'s.gif', '--dimension', 2])==0
    with Image.open(tmp_path/'s.gif') as im: assert im.n_frames==40
    assert run_verb(capsule_explore, ['--gif', tmp_path/'s.gif', '--dimension', 16])==2
    assert run_verb(capsule_explore, ['--gif', tmp_path/'s.avi'])==2

@pytest.mark.slow
def test_photographs_of_mnist(net):
    "A tenth of those of the results file"
    from capsule_routing.data import load_data
    test = load_data('mnist', progress=False).test
    right = 0
    for k in range(50):
        found = digits(grey(photograph(test.x[k,:].numpy(), list(STYLES)[k%len(STYLES)], 900+k)))
        if len(found)==1: right += int(predict(net, torch.from_numpy(found[0].picture)[None,None]).lengths.argmax()==test.y[k])
    assert right>=47
