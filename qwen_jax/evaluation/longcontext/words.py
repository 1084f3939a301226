"""Words of which the long-context tasks make their documents, in lists that have no word in common."""

ADJECTIVES = """
    amber ancient bitter bold brave bright broken bronze calm clever cold crimson curious daring dusty eager early
    empty fierce final frozen gentle giant glossy golden grand grey happy hidden hollow humble icy jolly late lively
    lonely loyal lucky mellow misty narrow noble pale patient plain proud quick quiet rapid red restless rough round
    royal rusty sharp shy silent silver simple sleepy slow smooth solid spicy steady stormy strange tender tiny vivid
    warm wild wise young
""".split()
ANIMALS = """
    badger bat bear beaver bison boar camel cat cheetah cobra condor cow coyote crab crane crow deer dingo dog dolphin
    donkey dove duck eagle eel elk falcon ferret finch fox frog gecko goat goose gorilla hamster hare hawk hedgehog
    heron hippo horse hyena ibex jackal jaguar koala lamb lemur leopard lion lizard llama lobster lynx magpie mole
    monkey moose moth mouse mule newt otter owl ox panda parrot pelican penguin pig pony puma quail rabbit raccoon rat
    raven salmon seal shark sheep skunk sloth snail snake sparrow spider squid stork swan tiger toad trout turtle
    walrus wasp weasel whale wolf wombat wren yak zebra
""".split()
THINGS = """
    acorn anchor anvil apron arrow axe badge bagel balloon banjo barrel basin basket beacon bell belt bench blanket
    board bonnet book boot bottle bowl box bracelet bread brick bridge broom brush bucket buckle button cabin cable
    cactus cake camera canal candle cannon canoe carpet cart castle cedar chain chair chalk cheese chess chimney
    cider clock cloth clover coal coat coffee coin collar comb compass copper coral cork cotton couch cradle crown
    crystal cup curtain cushion dagger daisy desk diamond dice dish doll door drawer drill drum easel elbow emerald
    engine fan feather fence fern fiddle flag flask flour flute fork fountain funnel garlic gate gear ginger glass
    globe glove glue grain granite grape guitar hammer handle harp hat helmet hinge honey hook horn ink iron ivory
    ivy jacket jam jar jewel jug kettle key kite knife knot ladder lamp lantern leaf lemon lens letter lever lily
    linen lock magnet mango map marble mask meadow medal melon metal mirror mitten moss motor mug mustard nail napkin
    necklace needle nest nickel notebook nut oar oat olive onion orchid organ oven paddle paint pan paper parcel pearl
    pebble pencil pepper petal piano pillow pin pipe plate plum pocket pot powder prism pulley pump puzzle quartz
    quilt radio raft rail rake razor ribbon ring rope rose rug ruler saddle salt sand satin saw scarf screw shawl
    shelf shell shield ship shirt shovel sign silk skate sled soap sock spade sponge spoon spring stamp statue steel
    stone stool stove straw sugar table tape tent thimble thread throne ticket tile timber tin toast torch towel
    tower tray trumpet trunk tulip tunnel umbrella vase velvet vest violin wagon wallet walnut wheat wheel whistle
    window wire wool wreath yarn zipper
""".split()
PEOPLE = """
    Ada Alan Anna Ben Carla Clara David Diego Edith Elena Emil Felix Grace Hugo Ines Ivan Jonas Julia Karl Laura Leo
    Maria Nina Oscar Paula Peter Rosa Simon Tara Victor
""".split()
DEEDS = """
    argued ate called danced dreamed drove hurried laughed listened moved painted paused played rested returned sailed
    sang slept smiled spoke stayed travelled waited walked whistled wondered worked wrote
""".split()
PLACES = """
    airport bakery beach cafe church cinema corner farm forest garden harbour hill hospital hotel island kitchen lake
    library market museum office park pier river school shore square stadium station street theatre town valley
    village
""".split()
TIMES = """
    at dawn, in spring, on Monday, at noon, last week, in the rain, before lunch, all day, at night
""".strip().split(", ")
