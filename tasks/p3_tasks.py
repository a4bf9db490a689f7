"""Which datasets and templates of P3 the papers train on and evaluate on.

Continued pretraining for promptability (appendix A) takes T0's: 313 templates of 35 datasets to
train on (counting the parts of adversarial_qa and of duorc as one dataset each) and 116 templates
of 11 to evaluate on (counting ANLI's three rounds).
"""

import re
from dataclasses import dataclass

# A dataset's name on the Hub, its part behind a slash, the number of its training examples; below,
# its templates as `word_name` spells them.
_TRAIN = """
adversarial_qa/dbert 10000
  answer_the_following_q based_on generate_question question_context_answer tell_what_it_is
adversarial_qa/dbidaf 10000
  answer_the_following_q based_on generate_question question_context_answer tell_what_it_is
adversarial_qa/droberta 10000
  answer_the_following_q based_on generate_question question_context_answer tell_what_it_is
ag_news 120000
  classify classify_question_first classify_with_choices classify_with_choices_question_first
  recommend which_section which_section_choices
amazon_polarity 3600000
  Is_this_product_review_positive Is_this_review Is_this_review_negative
  User_recommend_this_product convey_negative_or_positive_sentiment flattering_or_not
  negative_or_positive_tone user_satisfied would_you_buy
app_reviews 288065
  categorize_rating_using_review convert_to_rating convert_to_star_rating generate_review
cnn_dailymail/3.0.0 287113
  2_or_3_sentences generate_story news_card_view news_stock news_summary spice_up_story
  sum_in_brief tldr_summary write_an_outline
common_gen 67389
  Example_prompt Given_concepts_type_1 Given_concepts_type_2 Put_together
  choice_in_concept_centric_sentence_generation random_task_template_prompt sentence_to_concepts
  topic_to_sentence topics_from_the_sentence
cos_e/v1.11 9741
  aligned_with_common_sense description_question_option_id description_question_option_text
  explain_why_human generate_explanation_given_text i_think question_description_option_id
  question_description_option_text question_option_description_id
  question_option_description_text rationale
cosmos_qa 25262
  context_answer_to_question context_description_question_answer_id
  context_description_question_answer_text context_description_question_text
  context_question_description_answer_id context_question_description_answer_text
  context_question_description_text description_context_question_answer_id
  description_context_question_answer_text description_context_question_text no_prompt_id
  no_prompt_text only_question_answer
dbpedia_14 560000
  given_a_choice_of_categories_ given_a_list_of_category_what_does_the_title_belong_to
  given_list_what_category_does_the_paragraph_belong_to pick_one_category_for_the_following_text
dream 6116
  answer_to_dialogue baseline generate_first_utterance generate_last_utterance
  read_the_following_conversation_and_answer_the_question
duorc/ParaphraseRC 69524
  answer_question build_story_around_qa decide_worth_it extract_answer generate_question
  generate_question_by_answer movie_director question_answering title_generation
duorc/SelfRC 60721
  answer_question build_story_around_qa decide_worth_it extract_answer generate_question
  generate_question_by_answer movie_director question_answering title_generation
gigaword 3803957
  TLDR first_sentence_title generate_summary_for_this in_a_nutshell make_a_title reverse_writing
  write_a_title_for_this_sentence write_an_article write_its_sentence
glue/mrpc 3668
  equivalent generate_paraphrase generate_sentence paraphrase replace same_thing want_to_know
glue/qqp 363846
  answer duplicate duplicate_or_not meaning quora same_thing
imdb 25000
  Movie_Expressed_Sentiment Movie_Expressed_Sentiment_2
  Negation_template_for_positive_and_negative Reviewer_Enjoyment Reviewer_Enjoyment_Yes_No
  Reviewer_Expressed_Sentiment Reviewer_Opinion_bad_good_choices Reviewer_Sentiment_Feeling
  Sentiment_with_choices_ Text_Expressed_Sentiment Writer_Expressed_Sentiment
kilt_tasks/hotpotqa 88869
  combining_facts complex_question final_exam formulate straighforward_qa
multi_news 44972
  distill expand_reverse_task_ summarize summary_scenario synthesize what_are_the_key_points
paws/labeled_final 49401
  Concatenation Concatenation_no_label Meaning Meaning_no_label PAWS_ANLI_GPT3
  PAWS_ANLI_GPT3_no_label Rewrite Rewrite_no_label context_question context_question_no_label
  paraphrase_task task_description_no_label
qasc 8134
  is_correct_1 is_correct_2 qa_with_combined_facts_1 qa_with_separated_facts_1
  qa_with_separated_facts_2 qa_with_separated_facts_3 qa_with_separated_facts_4
  qa_with_separated_facts_5
quail 10246
  context_description_question_answer_id context_description_question_answer_text
  context_description_question_text context_question_answer_description_id
  context_question_answer_description_text context_question_description_answer_id
  context_question_description_answer_text context_question_description_text
  description_context_question_answer_id description_context_question_answer_text
  description_context_question_text no_prompt_id no_prompt_text
quarel 1941
  choose_between do_not_use heres_a_story logic_test testing_students
quartz 2696
  answer_question_based_on answer_question_below given_the_fact_answer_the_q
  having_read_above_passage paragraph_question_plain_concat read_passage_below_choose
  use_info_from_paragraph_question use_info_from_question_paragraph
quoref 19399
  Answer_Friend_Question Answer_Question_Given_Context Answer_Test Context_Contains_Answer
  Find_Answer Found_Context_Online Given_Context_Answer_Question Guess_Answer
  Guess_Title_For_Context Read_And_Extract_ What_Is_The_Answer
ropes 10924
  background_new_situation_answer background_situation_middle given_background_situation
  new_situation_background_answer plain_background_situation plain_bottom_hint
  plain_no_background prompt_beginning prompt_bottom_hint_beginning prompt_bottom_no_hint
  prompt_mix read_background_situation
rotten_tomatoes 8530
  Movie_Expressed_Sentiment Movie_Expressed_Sentiment_2 Reviewer_Enjoyment
  Reviewer_Enjoyment_Yes_No Reviewer_Expressed_Sentiment Reviewer_Opinion_bad_good_choices
  Reviewer_Sentiment_Feeling Sentiment_with_choices_ Text_Expressed_Sentiment
  Writer_Expressed_Sentiment
samsum 14732
  Generate_a_summary_for_this_dialogue Given_the_above_dialogue_write_a_summary
  Sum_up_the_following_dialogue Summarize_ Summarize_this_dialogue_ To_sum_up_this_dialog
  Write_a_dialogue_that_match_this_summary
sciq 11679
  Direct_Question Direct_Question_Closed_Book_ Multiple_Choice Multiple_Choice_Closed_Book_
  Multiple_Choice_Question_First
social_i_qa 33410
  Check_if_a_random_answer_is_valid_or_not Generate_answer Generate_the_question_from_the_answer
  I_was_wondering Show_choices_and_generate_answer Show_choices_and_generate_index
trec 5452
  fine_grained_ABBR fine_grained_ABBR_context_first fine_grained_DESC
  fine_grained_DESC_context_first fine_grained_ENTY fine_grained_HUM
  fine_grained_HUM_context_first fine_grained_LOC fine_grained_LOC_context_first
  fine_grained_NUM fine_grained_NUM_context_first fine_grained_open
  fine_grained_open_context_first pick_the_best_descriptor trec1 trec2
  what_category_best_describe which_category_best_describes
wiki_bio 582659
  comprehension guess_person key_content what_content who
wiki_hop/original 43738
  choose_best_object_affirmative_1 choose_best_object_affirmative_2
  choose_best_object_affirmative_3 choose_best_object_interrogative_1
  choose_best_object_interrogative_2 explain_relation generate_object generate_subject
  generate_subject_and_object
wiki_qa 20360
  Decide_good_answer Direct_Answer_to_Question Generate_Question_from_Topic Is_This_True_
  Jeopardy_style Topic_Prediction_Answer_Only Topic_Prediction_Question_Only
  Topic_Prediction_Question_and_Answer_Pair automatic_system exercise found_on_google
wiqa 29808
  does_the_supposed_perturbation_have_an_effect effect_with_label_answer
  effect_with_string_answer what_is_the_final_step_of_the_following_process
  what_is_the_missing_first_step what_might_be_the_first_step_of_the_process
  what_might_be_the_last_step_of_the_process which_of_the_following_is_the_supposed_perturbation
xsum 204045
  DOC_boils_down_to_simple_idea_that DOC_given_above_write_one_sentence
  DOC_how_would_you_rephrase_few_words DOC_tldr DOC_write_summary_of_above article_DOC_summary
  college_roommate_asked_DOC_so_I_recap read_below_DOC_write_abstract summarize_DOC
  summarize_this_DOC_summary
yelp_review_full 650000
  based_on_that format_rating format_score format_star on_a_scale so_i_would this_place
"""
_EVAL = """
anli
  GPT_3_style MNLI_crowdsource always_sometimes_never based_on_the_previous_passage can_we_infer
  claim_true_false_inconclusive consider_always_sometimes_never does_it_follow_that
  does_this_imply guaranteed_possible_impossible guaranteed_true justified_in_saying
  must_be_true should_assume take_the_following_as_truth
hellaswag
  Predict_ending_with_hint Randomized_prompts_template complete_first_then
  if_begins_how_continues
story_cloze/2016
  Answer_Given_options Choose_Story_Ending Movie_What_Happens_Next Novel_Correct_Ending
  Story_Continuation_and_Options
super_glue/cb
  GPT_3_style MNLI_crowdsource always_sometimes_never based_on_the_previous_passage can_we_infer
  claim_true_false_inconclusive consider_always_sometimes_never does_it_follow_that
  does_this_imply guaranteed_possible_impossible guaranteed_true justified_in_saying
  must_be_true should_assume take_the_following_as_truth
super_glue/copa
  C1_or_C2_premise_so_because_ _As_a_result_C1_or_C2_ _What_could_happen_next_C1_or_C2_
  _which_may_be_caused_by _why_C1_or_C2 best_option cause_effect choose exercise i_am_hesitating
  more_likely plausible_alternatives
super_glue/rte
  GPT_3_style MNLI_crowdsource based_on_the_previous_passage can_we_infer does_it_follow_that
  does_this_imply guaranteed_true justified_in_saying must_be_true should_assume
super_glue/wic
  GPT_3_prompt GPT_3_prompt_with_label affirmation_true_or_false grammar_homework polysemous
  question_context_meaning question_context_meaning_with_label question_context same_sense
  similar_sense
super_glue/wsc.fixed
  GPT_3_Style I_think_they_mean Who_or_what_is_are by_p_they_mean does_p_stand_for
  does_the_pronoun_refer_to in_other_words p_is_are_r replaced_with the_pronoun_refers_to
winogrande/winogrande_xl
  Replace does_underscore_refer_to fill_in_the_blank stand_for underscore_refer_to
"""


@dataclass(frozen=True)
class Dataset:
    """A dataset and its templates.

    Attributes:
        path: Its name on the Hub and, behind a slash, its part; promptsource has its templates
            there.
        num_train: Examples of the training split; 0 where nothing depends on it.
        templates: Names as `word_name` spells them.
    """

    path: str
    num_train: int
    templates: tuple[str, ...]

    def task(self, template: str) -> str:
        """Returns P3's name for the dataset under one of its templates."""
        return f"{word_name(self.path)}_{template}"


def word_name(text: str) -> str:
    """Returns a name as P3 spells it: anything but letters, digits, dots and underscores is `_`."""
    return re.sub(r"[^\w.]+", "_", text)


def _parse(table: str) -> tuple[Dataset, ...]:
    datasets = []
    for entry in re.split(r"\n(?=\S)", table.strip()):
        head, *templates = entry.split("\n")
        path, _, size = head.partition(" ")
        datasets.append(Dataset(path, int(size or 0), tuple(" ".join(templates).split())))
    return tuple(datasets)


TRAIN = _parse(_TRAIN)
EVAL = _parse(_EVAL)
